//! Which way a RandLoRA layer is computed, and in what pieces.
//!
//! A pure function of shapes: never of a timing or of the number of threads, so that the same input
//! gives the same bits. The constants here are the only ones; `cargo bench --bench randlora` shows
//! what they are worth.

/// How one half (forward or backward) of a RandLoRA layer is computed. Both are exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Build a panel of W0 + ΔW in scratch and use it in the product that the frozen layer needs
    /// anyway. Its own work does not grow with the tokens.
    Panel,
    /// Apply the factors of ΔW to the tokens, a block of bases at a time. Cheap for few tokens.
    Factored,
}

/// The sizes that a plan follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// T: rows of the input.
    pub tokens: usize,
    /// Width of the input.
    pub inputs: usize,
    /// Width of the output.
    pub outputs: usize,
    /// r: the rank of one basis.
    pub rank: usize,
}

impl Sizes {
    /// m: the smaller side of the weight, where γ sits.
    pub fn small(&self) -> usize {
        self.inputs.min(self.outputs)
    }

    /// D: the larger side.
    pub fn large(&self) -> usize {
        self.inputs.max(self.outputs)
    }

    /// n = ⌈m/r⌉: the number of bases that give full rank. A rank of 0 counts as 1.
    pub fn bases(&self) -> usize {
        self.small().div_ceil(self.rank.max(1))
    }

    /// n·r: the columns of all bases side by side, at least m.
    pub fn columns(&self) -> usize {
        self.bases() * self.rank
    }
}

/// What a layer is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wants {
    /// The gradients of λ and γ.
    pub diagonals: bool,
    /// The gradient of the input.
    pub input: bool,
    /// The adapter's input goes through dropout, the frozen layer's does not.
    pub dropout: bool,
}

/// How a RandLoRA layer is computed: the way of each half and the size of the pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The way of the forward.
    pub forward: Way,
    /// The way of the backward.
    pub backward: Way,
    /// For in > out, both halves factored: h = x·B is kept for the backward instead of x.
    pub keep_h: bool,
    /// Columns of the weight's smaller side in a panel.
    pub panel: usize,
    /// Columns of the bases in a factored block.
    pub block: usize,
    /// Rows of the input that are worked on at a time in the factored way.
    pub chunk: usize,
}

/// Elements in one panel or block: 4 MiB of f32. Two or three are held at a time.
const PIECE: usize = 1 << 20;
/// Rows of the input in a chunk, where nothing narrower is wanted.
const CHUNK: usize = 4096;
/// What making one element of a dropout mask costs, in floating point operations of a product.
const MASK_FLOPS: f64 = 256.0;

impl Plan {
    /// The cheapest plan by floating point operations.
    pub fn new(sizes: Sizes, wants: Wants) -> Plan {
        use Way::{Factored, Panel};
        let mut best: Option<(f64, Plan)> = None;
        for (forward, backward) in
            [(Factored, Factored), (Panel, Factored), (Factored, Panel), (Panel, Panel)]
        {
            let plan = Plan::forced(sizes, wants, forward, backward);
            let cost = plan.extra_flops(sizes, wants);
            if best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, plan));
            }
        }
        best.expect("four plans were tried").1
    }

    /// The plan with these ways, whatever they cost.
    pub fn forced(sizes: Sizes, wants: Wants, forward: Way, backward: Way) -> Plan {
        // At least two pieces, or a small layer's ΔW would exist whole.
        let piece = |other: usize, all: usize| {
            let fits = PIECE / other.max(1) / 32 * 32;
            fits.max(32).min(all.div_ceil(2)).max(1)
        };
        let wide = sizes.inputs > sizes.outputs;
        let factored = (forward, backward) == (Way::Factored, Way::Factored);
        // With a rank above m it would be wider than x.
        let keep_h = wide && wants.diagonals && factored && sizes.columns() <= sizes.inputs;
        // With dropout a chunk of the input is copied.
        let chunk = if wants.dropout { (PIECE / sizes.inputs.max(1)).clamp(16, CHUNK) } else { CHUNK };
        Plan {
            forward,
            backward,
            keep_h,
            panel: piece(sizes.large().max(sizes.columns()), sizes.small()),
            block: piece(sizes.small(), sizes.columns()),
            chunk: chunk.min((2 * PIECE / piece(sizes.small(), sizes.columns())).max(16)),
        }
    }

    /// Floating point operations beyond those of the frozen layer.
    ///
    /// With T tokens, c = n·r columns (m of them where r divides m):
    /// forward, panel 2·D·m·c, factored 2·T·c·(m + D); backward, panel 2·D·m·c for the panel again
    /// (if dx is wanted), 2·T·m·D for its gradient and 2·D·m·c to pull that back to the diagonals,
    /// factored 2·T·D·c for h (unless kept), 2·T·m·c for M, 2·T·m·c (in ≤ out) or 2·T·c·(m + D)
    /// for dx.
    pub fn extra_flops(&self, sizes: Sizes, wants: Wants) -> f64 {
        // In f64: the products overflow a usize of 32 bits.
        let [t, m, d, c] = [sizes.tokens, sizes.small(), sizes.large(), sizes.columns()].map(|n| n as f64);
        let wide = sizes.inputs > sizes.outputs;
        let (build, up_or_down) = (2.0 * d * m * c, 2.0 * t * c * (m + d));
        // With dropout the panel no longer holds W0, and its product comes on top.
        let beside = if wants.dropout { 2.0 * t * m * d } else { 0.0 };
        // The mask is made again for every panel (the part that meets it, for in ≤ out) and block.
        let elements = t * sizes.inputs as f64;
        let mask = |passes: usize| if wants.dropout { passes as f64 * elements * MASK_FLOPS } else { 0.0 };
        let panels = mask(if wide { sizes.small().div_ceil(self.panel) } else { 1 });
        let blocks = mask(sizes.columns().div_ceil(self.block));
        let forward = match self.forward {
            Way::Panel => build + beside + panels,
            Way::Factored => up_or_down + blocks,
        };
        let (to_x, to_diagonals) = (wants.input as u8 as f64, wants.diagonals as u8 as f64);
        let backward = match self.backward {
            Way::Panel => {
                to_x * (build + beside + mask(1)) + to_diagonals * (2.0 * t * m * d + build + panels)
            }
            Way::Factored if wide => {
                let h = if self.keep_h { 0.0 } else { 2.0 * t * d * c + blocks };
                to_diagonals * (h + 2.0 * t * m * c) + to_x * (up_or_down + mask(1))
            }
            Way::Factored => {
                let h = if wants.input || wants.diagonals { 2.0 * t * d * c } else { 0.0 };
                h + to_diagonals * (2.0 * t * m * c + blocks) + to_x * (2.0 * t * m * c + mask(1))
            }
        };
        forward + backward
    }

    /// Floating point operations of the frozen layer alone: 2·T·m·D for the output, as many again
    /// for dx.
    pub fn frozen_flops(sizes: Sizes, wants: Wants) -> f64 {
        let [t, m, d] = [sizes.tokens, sizes.small(), sizes.large()].map(|n| n as f64);
        (1.0 + wants.input as u8 as f64) * 2.0 * t * m * d
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRAIN: Wants = Wants { diagonals: true, input: true, dropout: false };

    fn best(tokens: usize, inputs: usize, outputs: usize) -> (Way, Way, f64) {
        let sizes = Sizes { tokens, inputs, outputs, rank: 32 };
        let plan = Plan::new(sizes, TRAIN);
        let ratio = 1.0 + plan.extra_flops(sizes, TRAIN) / Plan::frozen_flops(sizes, TRAIN);
        (plan.forward, plan.backward, (100.0 * ratio).round() / 100.0)
    }

    /// The table of design.md §4.
    #[test]
    fn known_shapes() {
        use Way::{Factored, Panel};
        assert_eq!(best(2048, 768, 768), (Panel, Panel, 2.06));
        assert_eq!(best(2048, 768, 3072), (Panel, Factored, 1.94));
        assert_eq!(best(4096, 384, 384), (Panel, Panel, 1.64));
        assert_eq!(best(256, 768, 768), (Factored, Factored, 3.5));
        assert_eq!(best(16, 768, 768), (Factored, Factored, 3.5));
    }

    #[test]
    fn no_piece_holds_the_whole_and_all_fit() {
        for (inputs, outputs) in [(768, 768), (2, 9), (9, 2), (8192, 8192), (64, 8192), (3072, 768), (1, 1)] {
            let sizes = Sizes { tokens: 100_000, inputs, outputs, rank: 16 };
            for dropout in [false, true] {
                let wants = Wants { dropout, ..TRAIN };
                let plan = Plan::new(sizes, wants);
                assert!(plan.panel < sizes.small() || sizes.small() == 1);
                assert!(plan.block < sizes.columns());
                let panel = plan.panel * (sizes.large() + sizes.columns());
                let factored = plan.block * (2 * sizes.small() + plan.chunk);
                let masked = if dropout { plan.chunk * sizes.inputs } else { 0 };
                assert!(4 * (panel + masked) <= 16 << 20, "{sizes:?} {plan:?}");
                assert!(4 * (factored + masked) <= 16 << 20, "{sizes:?} {plan:?}");
            }
        }
    }
}
