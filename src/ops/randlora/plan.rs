//! Which way a RandLoRA layer is computed, and in what pieces.
//!
//! A pure function of shapes: never of a timing or of the number of threads, so that the same input
//! gives the same bits. The constants here are the only ones; `cargo bench --bench randlora` shows
//! what they are worth.

use super::bases::Form;

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
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// The way of the forward.
    pub forward: Way,
    /// The way of the backward.
    pub backward: Way,
    /// For in > out, both halves factored: h = x·B is kept for the backward instead of x.
    pub keep_h: bool,
    /// What there is of the bases that it is for.
    pub form: Form,
    /// Columns of the weight's smaller side in a panel.
    pub panel: usize,
    /// With block bases, rows of the weight's larger side in a panel that has all of the smaller one.
    pub rows: usize,
    /// Columns of the bases in a factored block.
    pub block: usize,
    /// Rows of the input that are worked on at a time in the factored way.
    pub chunk: usize,
}

/// Elements in a panel: 5 MiB of f32, with which 768 columns of 3072 are two of them.
const PANEL: usize = 5 << 18;
/// Elements in a block of the factored way: 4 MiB, of which up to four are held, with what comes of the tokens.
const BLOCK: usize = 1 << 20;
/// Rows of the input in a chunk, where nothing narrower is wanted.
const CHUNK: usize = 4096;
/// What adding a number by a list costs, in multiply-adds of a product.
const ADDITION: f64 = 4.0;
/// What an element of a panel of block bases costs in passes over memory, in floating point operations of a product:
/// its own product has but r terms, so they are not hidden.
const PASSES: f64 = 40.0;
/// What making one element of a dropout mask costs, in floating point operations of a product.
const MASK_FLOPS: f64 = 256.0;

impl Plan {
    /// The cheapest plan by floating point operations, and by passes over memory where these count.
    pub fn new(sizes: Sizes, wants: Wants, form: impl Into<Form>) -> Plan {
        let form = form.into();
        use Way::{Factored, Panel};
        let mut best: Option<(f64, Plan)> = None;
        for (forward, backward) in
            [(Factored, Factored), (Panel, Factored), (Factored, Panel), (Panel, Panel)]
        {
            let plan = Plan::forced(sizes, wants, form, forward, backward);
            let cost = plan.extra_flops(sizes, wants) + plan.passes(sizes, wants);
            if best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, plan));
            }
        }
        best.expect("four plans were tried").1
    }

    /// The plan with these ways, whatever they cost.
    pub fn forced(sizes: Sizes, wants: Wants, form: impl Into<Form>, forward: Way, backward: Way) -> Plan {
        // At least two pieces, or a small layer's ΔW would exist whole.
        let piece = |elements: usize, other: usize, all: usize| {
            let fits = elements / other.max(1) / 32 * 32;
            fits.max(32).min(all.div_ceil(2)).max(1)
        };
        let block = piece(BLOCK, sizes.small(), sizes.columns());
        let wide = sizes.inputs > sizes.outputs;
        let factored = (forward, backward) == (Way::Factored, Way::Factored);
        // With a rank above m it would be wider than x.
        let keep_h = wide && wants.diagonals && factored && sizes.columns() <= sizes.inputs;
        // With dropout a chunk of the input is copied.
        let chunk = if wants.dropout { (BLOCK / sizes.inputs.max(1)).clamp(16, CHUNK) } else { CHUNK };
        Plan {
            forward,
            backward,
            keep_h,
            form: form.into(),
            panel: piece(PANEL, sizes.large().max(sizes.columns()), sizes.small()),
            rows: piece(PANEL, sizes.small(), sizes.large()),
            block,
            chunk: chunk.min((2 * BLOCK / block).max(16)),
        }
    }

    /// Floating point operations beyond those of the frozen layer.
    ///
    /// With T tokens, c = n·r columns (m of them where r divides m) and b = c entries in a row of B
    /// (r of block bases, 4 times those that are not 0 of ternary ones, whose additions cost as much):
    /// forward, panel 2·D·m·b, factored 2·T·c·m + 2·T·D·b; backward, panel
    /// 2·D·m·b for the panel again (if dx is wanted), 2·T·m·D for its gradient and 2·D·m·c to pull
    /// that back to the diagonals, factored 2·T·D·b for h (unless kept), 2·T·m·c for M, 2·T·m·c
    /// (in ≤ out) or 2·T·c·m + 2·T·D·b for dx. The diagonals of block bases are always factored.
    pub fn extra_flops(&self, sizes: Sizes, wants: Wants) -> f64 {
        // In f64: the products overflow a usize of 32 bits.
        let [t, m, d, c] = [sizes.tokens, sizes.small(), sizes.large(), sizes.columns()].map(|n| n as f64);
        let wide = sizes.inputs > sizes.outputs;
        let block = self.form == Form::Block;
        let b = match self.form {
            Form::Dense => c,
            Form::Block => sizes.rank as f64,
            Form::Ternary { share } => ADDITION * share * c,
        };
        let (build, through_b, through_c) = (2.0 * d * m * b, 2.0 * t * d * b, 2.0 * t * m * c);
        // With dropout the panel no longer holds W0, and its product comes on top.
        let beside = if wants.dropout { 2.0 * t * m * d } else { 0.0 };
        // The mask is made again for every panel (the part that meets it, for in ≤ out) and block.
        let elements = t * sizes.inputs as f64;
        let mask = |passes: usize| if wants.dropout { passes as f64 * elements * MASK_FLOPS } else { 0.0 };
        let panels = mask(if wide { sizes.small().div_ceil(self.panel) } else { 1 });
        let blocks = mask(sizes.columns().div_ceil(self.block));
        let forward = match self.forward {
            Way::Panel => build + beside + panels,
            Way::Factored => through_c + through_b + blocks,
        };
        let h = match (self.keep_h, wide) {
            (true, _) => 0.0,
            (false, true) => through_b + blocks,
            (false, false) => through_b,
        };
        let factored_pull = through_c + if wide { 0.0 } else { blocks };
        let (dx, pull) = match self.backward {
            Way::Panel if block => (build + beside + mask(1), h + factored_pull),
            Way::Panel => (build + beside + mask(1), 2.0 * t * m * d + build + panels),
            Way::Factored if wide => (through_c + through_b + mask(1), h + factored_pull),
            // dx is made of the same h; without the diagonals it still needs one.
            Way::Factored if wants.diagonals => (through_c + mask(1), h + factored_pull),
            Way::Factored => (h + through_c + mask(1), 0.0),
        };
        let (to_x, to_diagonals) = (wants.input as u8 as f64, wants.diagonals as u8 as f64);
        forward + to_x * dx + to_diagonals * pull
    }

    /// What the panels of block bases cost beyond their operations, in operations. It is no part of
    /// [`Plan::extra_flops`], which is reported as the bound.
    fn passes(&self, sizes: Sizes, wants: Wants) -> f64 {
        let backward = self.backward == Way::Panel && wants.input;
        let panels = (self.forward == Way::Panel) as u8 + backward as u8;
        match self.form {
            Form::Block => panels as f64 * PASSES * (sizes.small() as f64) * (sizes.large() as f64),
            Form::Dense | Form::Ternary { .. } => 0.0,
        }
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

    fn best(form: Form, tokens: usize, inputs: usize, outputs: usize) -> (Way, Way, f64) {
        let sizes = Sizes { tokens, inputs, outputs, rank: 32 };
        let plan = Plan::new(sizes, TRAIN, form);
        let ratio = 1.0 + plan.extra_flops(sizes, TRAIN) / Plan::frozen_flops(sizes, TRAIN);
        (plan.forward, plan.backward, (100.0 * ratio).round() / 100.0)
    }

    /// The table of design.md §4.
    #[test]
    fn known_shapes() {
        use Way::{Factored, Panel};
        let best = |tokens, inputs, outputs| best(Form::Dense, tokens, inputs, outputs);
        assert_eq!(best(2048, 768, 768), (Panel, Panel, 2.06));
        assert_eq!(best(2048, 768, 3072), (Panel, Factored, 1.94));
        assert_eq!(best(4096, 384, 384), (Panel, Panel, 1.64));
        assert_eq!(best(256, 768, 768), (Factored, Factored, 3.5));
        assert_eq!(best(16, 768, 768), (Factored, Factored, 3.5));
    }

    /// 1 + (4Drm + 2TDr + 2Tm²)/4TmD, and for few tokens all factored.
    #[test]
    fn known_shapes_of_block_bases() {
        use Way::{Factored, Panel};
        let best = |tokens, inputs, outputs| best(Form::Block, tokens, inputs, outputs);
        for (inputs, outputs, ratio) in [(768, 768, 1.54), (768, 3072, 1.16), (3072, 768, 1.16)] {
            assert_eq!(best(2048, inputs, outputs), (Panel, Panel, ratio));
        }
        assert_eq!(best(256, 768, 768), (Panel, Panel, 1.65));
        assert_eq!(best(16, 768, 768), (Factored, Factored, 2.54));
    }

    /// With very sparse bases for 768 columns, panels from T < m on.
    #[test]
    fn known_shapes_of_ternary_bases() {
        use Way::{Factored, Panel};
        let share = 2.0 / 768f64.sqrt();
        let best = |tokens, inputs, outputs| best(Form::Ternary { share }, tokens, inputs, outputs);
        assert_eq!(best(2048, 768, 768), (Panel, Panel, 1.66));
        assert_eq!(best(256, 768, 768), (Panel, Factored, 2.58));
        assert_eq!(best(128, 768, 768), (Factored, Factored, 2.79));
        assert_eq!(best(16, 768, 768), (Factored, Factored, 2.79));
        assert_eq!(best(2048, 768, 3072), (Panel, Factored, 1.45));
    }

    #[test]
    fn no_piece_holds_the_whole_and_all_fit() {
        let shapes = [(768, 768), (2, 9), (9, 2), (8192, 8192), (64, 8192), (3072, 768), (1, 1)];
        let between = [(1280, 1280), (1600, 1600), (2048, 2048), (2048, 8192), (8192, 2048), (3072, 3072)];
        for (inputs, outputs) in shapes.into_iter().chain(between) {
            let sizes = Sizes { tokens: 100_000, inputs, outputs, rank: 16 };
            let forms = [Form::Dense, Form::Block, Form::Ternary { share: 0.05 }];
            for (dropout, form) in [false, true].into_iter().flat_map(|d| forms.map(|f| (d, f))) {
                let wants = Wants { dropout, ..TRAIN };
                let plan = Plan::new(sizes, wants, form);
                assert!(plan.panel < sizes.small() || sizes.small() == 1);
                assert!(plan.rows < sizes.large() || sizes.large() == 1);
                assert!(plan.block < sizes.columns());
                let panel = match form {
                    Form::Dense | Form::Ternary { .. } => plan.panel * (sizes.large() + sizes.columns()),
                    Form::Block => {
                        let elements = (plan.panel * sizes.large()).max(plan.rows * sizes.small());
                        2 * elements + sizes.large() * sizes.rank
                    }
                };
                let factored = plan.block * (2 * sizes.small() + plan.chunk);
                let masked = if dropout { plan.chunk * sizes.inputs } else { 0 };
                assert!(4 * (panel + masked) <= 16 << 20, "{sizes:?} {plan:?}");
                assert!(4 * (factored + masked) <= 16 << 20, "{sizes:?} {plan:?}");
            }
        }
    }
}
