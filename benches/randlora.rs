//! One linear layer, forward and backward: RandLoRA (r = 32) over the frozen layer, with dense, block and very
//! sparse bases, both ways of each half and the plan's choice, next to the ratio of floating point
//! operations.
//!
//! `cargo bench --bench randlora`; with `-- grid` how good the plan's choice is over many shapes, with
//! `-- ternary` what ternary bases cost as they are stored and written out, with `-- tokens` the cost of a token
//! from 10³ to 10⁵ of them.

mod common;

use std::sync::Arc;

use randlora::adapters::{BasesSpec, Distribution};
use randlora::{
    Bases, DType, Device, Pairing, Plan, RandLoraOptions, Sizes, Structure, Tensor, Wants, Way,
    randlora_linear,
};

const WANTS: Wants = Wants { diagonals: true, input: true, dropout: false };

fn main() {
    let mode = |name: &str| std::env::args().any(|argument| argument == name);
    match () {
        _ if mode("grid") => grid(),
        _ if mode("ternary") => ternary(),
        _ if mode("tokens") => tokens(),
        _ => layers(),
    }
}

/// The kinds of bases that are stored in different ways.
const KINDS: [&str; 3] = ["dense", "block", "sparse"];

/// Bases by their name, for layers of these sizes.
fn bases(kind: &str, sizes: Sizes) -> Bases {
    let (distribution, structure) = match kind {
        "block" => (Distribution::Uniform, Structure::Block),
        "sparse" => (Distribution::very_sparse(sizes.small()), Structure::Dense),
        _ => (Distribution::Uniform, Structure::Dense),
    };
    made(distribution, structure, sizes)
}

fn made(distribution: Distribution, structure: Structure, sizes: Sizes) -> Bases {
    let (rank, small, large) = (sizes.rank, sizes.small(), sizes.large());
    let spec = BasesSpec { seed: 0, distribution, structure, rank, small, large, pairing: Pairing::Paper };
    spec.generate(&Device::cpu()).expect("sensible sizes")
}

fn layers() {
    println!(
        "{:>18} {:>6} {:>10} {:>9} {:>7} {:>7} | {:>6} {:>6} {:>6} {:>6}  factors; p = panel, f = factored, forward then backward",
        "T×in→out", "bases", "frozen ms", "RandLoRA", "factor", "FLOPs", "pp", "pf", "fp", "ff"
    );
    let shapes = [
        (2048, 768, 768),
        (2048, 768, 3072),
        (2048, 3072, 768),
        (4096, 384, 384),
        (256, 768, 768),
        (16, 768, 768),
    ];
    for kind in KINDS {
        for (tokens, inputs, outputs) in shapes {
            let sizes = Sizes { tokens, inputs, outputs, rank: 32 };
            let bases = Arc::new(bases(kind, sizes));
            let found = measure(sizes, &bases, 11);
            let plan = Plan::new(sizes, WANTS, bases.form());
            let flops = 1.0 + plan.extra_flops(sizes, WANTS) / Plan::frozen_flops(sizes, WANTS);
            let [pp, pf, fp, ff] = found.forced.map(|ms| ms / found.frozen);
            println!(
                "{:>18} {:>6} {:>10.2} {:>9.2} {:>7.2} {flops:>7.2} | {pp:>6.2} {pf:>6.2} {fp:>6.2} {ff:>6.2}",
                format!("{tokens}×{inputs}→{outputs}"),
                kind,
                found.frozen,
                found.planned,
                found.planned / found.frozen,
            );
        }
    }
}

/// The plan's choice over the fastest of the four mixes.
fn grid() {
    println!(
        "{:>6} {:>18} {:>6} {:>6}  the plan's over the fastest; * where over 1.10",
        "bases", "T×in→out", "plan", "best"
    );
    for kind in KINDS {
        for (small, factor) in [256, 384].into_iter().flat_map(|small| [1, 2, 4, 8].map(|f| (small, f))) {
            let large = factor * small;
            for (inputs, outputs) in [(small, large), (large, small)].into_iter().take(factor.min(2)) {
                TOKENS.iter().for_each(|&tokens| choice(kind, Sizes { tokens, inputs, outputs, rank: 32 }));
            }
        }
    }
}

/// A line of the grid.
fn choice(kind: &str, sizes: Sizes) {
    let bases = Arc::new(bases(kind, sizes));
    let plan = Plan::new(sizes, WANTS, bases.form());
    let found = measure(sizes, &bases, if sizes.tokens > 1024 { 5 } else { 15 });
    let place = WAYS.iter().position(|&ways| ways == (plan.forward, plan.backward)).unwrap_or(0);
    let best = (0..4).min_by(|&a, &b| found.forced[a].total_cmp(&found.forced[b])).unwrap_or(0);
    let over = found.forced[place] / found.forced[best];
    println!(
        "{kind:>6} {:>18} {:>6} {:>6} {over:>5.2}{}  {}",
        format!("{}×{}→{}", sizes.tokens, sizes.inputs, sizes.outputs),
        NAMES[place],
        NAMES[best],
        if over > 1.1 { "*" } else { " " },
        found.forced.map(|ms| format!("{:.2}", ms / found.frozen)).join(" "),
    );
}

/// W0 + ΔW built once (one token through it, panels) and whole layers, with ternary bases as they are stored over
/// the same bases written out.
fn ternary() {
    println!(
        "{:>12} {:>10} {:>10} {:>11} {:>11} {:>7} {:>24}",
        "bases", "in→out", "form", "build ms", "dense ms", "faster", "bytes, as stored, dense"
    );
    for (inputs, outputs) in [(384, 384), (768, 768), (768, 3072), (3072, 768), (2048, 2048)] {
        let sizes = Sizes { tokens: 1, inputs, outputs, rank: 32 };
        for (name, distribution) in [
            ("signs", Distribution::SIGNS),
            ("sparse", Distribution::SPARSE),
            ("very sparse", Distribution::very_sparse(sizes.small())),
        ] {
            let stored = made(distribution, Structure::Dense, sizes);
            let dense = written_out(&stored);
            let way = Some((Way::Panel, Way::Panel));
            let layer = Layer::new(sizes);
            let run = |bases: &Bases| {
                let options =
                    RandLoraOptions { bases: Arc::new(bases.clone()), scale: 1.0, dropout: None, ways: way };
                let layer = &layer;
                move || drop(layer.forward(&options))
            };
            let (mut of_stored, mut of_dense) = (run(&stored), run(&dense));
            let ms = common::medians(21, &mut [&mut of_stored, &mut of_dense]);
            println!(
                "{name:>12} {:>10} {:>10} {:>11.3} {:>11.3} {:>7.2} {:>24}",
                format!("{inputs}→{outputs}"),
                format!("{:?}", stored.form()).split(' ').next().unwrap_or_default(),
                ms[0],
                ms[1],
                ms[1] / ms[0],
                format!("{}, {}", stored.bytes(), dense.bytes()),
            );
        }
    }
}

/// The same bases with a row more, which no layer reads and whose numbers are not ternary: stored dense.
fn written_out(bases: &Bases) -> Bases {
    let b = bases.b().expect("memory");
    let row = Tensor::full(0.25, [1, b.dims()[1], b.dims()[2]], DType::F32, b.device()).expect("memory");
    let b = Tensor::concat(&[&b, &row], 0).expect("they fit");
    Bases::new(bases.a(), &b, bases.pairing()).expect("they fit")
}

/// Microseconds for a token, from 10³ to 10⁵ of them, and how that grows.
fn tokens() {
    println!(
        "{:>10} {:>7} {:>8} {:>10} {:>11} {:>8} {:>12}",
        "in→out", "bases", "T", "frozen µs", "RandLoRA µs", "factor", "over 10³'s"
    );
    for (inputs, outputs) in [(384, 384), (384, 1536), (1536, 384), (768, 768)] {
        for kind in KINDS {
            let mut first = None;
            for tokens in [1_000, 3_000, 10_000, 30_000, 100_000] {
                let sizes = Sizes { tokens, inputs, outputs, rank: 32 };
                let layer = Layer::new(sizes);
                let options = RandLoraOptions {
                    bases: Arc::new(bases(kind, sizes)),
                    scale: 1.0,
                    dropout: None,
                    ways: None,
                };
                let rounds = if tokens > 10_000 { 3 } else { 9 };
                let (mut frozen, mut adapted) = (|| layer.frozen(), || layer.adapted(&options));
                let ms = common::medians(rounds, &mut [&mut frozen, &mut adapted]);
                let [frozen, adapted] = [ms[0], ms[1]].map(|ms| ms * 1e3 / tokens as f64);
                println!(
                    "{:>10} {kind:>7} {tokens:>8} {frozen:>10.3} {adapted:>11.3} {:>8.2} {:>12.2}",
                    format!("{inputs}→{outputs}"),
                    adapted / frozen,
                    adapted / *first.get_or_insert(adapted),
                );
            }
        }
    }
}

const TOKENS: [usize; 8] = [1, 16, 64, 256, 1024, 2048, 4096, 8192];
const WAYS: [(Way, Way); 4] = [
    (Way::Panel, Way::Panel),
    (Way::Panel, Way::Factored),
    (Way::Factored, Way::Panel),
    (Way::Factored, Way::Factored),
];
const NAMES: [&str; 4] = ["pp", "pf", "fp", "ff"];

/// Milliseconds.
struct Found {
    frozen: f64,
    planned: f64,
    /// In the order of [`WAYS`].
    forced: [f64; 4],
}

/// A layer's tensors.
struct Layer {
    x: Tensor,
    weight: Tensor,
    lambda: Tensor,
    gamma: Tensor,
    dy: Tensor,
}

impl Layer {
    fn new(sizes: Sizes) -> Layer {
        let device = Device::cpu();
        let full = |value, dims: [usize; 2]| Tensor::full(value, dims, DType::F32, &device).expect("memory");
        Layer {
            x: full(0.5, [sizes.tokens, sizes.inputs]).track(),
            weight: full(0.1, [sizes.outputs, sizes.inputs]),
            lambda: full(0.2, [sizes.rank, sizes.bases()]).track(),
            gamma: full(0.3, [sizes.bases(), sizes.small()]).track(),
            dy: full(1.0, [sizes.tokens, sizes.outputs]),
        }
    }

    fn frozen(&self) {
        self.x.linear(&self.weight, None).and_then(|y| y.backward_from(&self.dy)).expect("they fit");
    }

    fn forward(&self, options: &RandLoraOptions) -> Tensor {
        randlora_linear(&self.x, &self.weight, None, &self.lambda, &self.gamma, options).expect("they fit")
    }

    fn adapted(&self, options: &RandLoraOptions) {
        self.forward(options).backward_from(&self.dy).expect("they fit");
    }
}

fn measure(sizes: Sizes, bases: &Arc<Bases>, rounds: usize) -> Found {
    let layer = &Layer::new(sizes);
    let with = |ways| {
        let options = RandLoraOptions { bases: bases.clone(), scale: 1.0, dropout: None, ways };
        move || layer.adapted(&options)
    };
    let mut frozen = || layer.frozen();
    let [mut pp, mut pf, mut fp, mut ff] = WAYS.map(|ways| with(Some(ways)));
    let mut planned = with(None);
    let ms = common::medians(rounds, &mut [&mut frozen, &mut planned, &mut pp, &mut pf, &mut fp, &mut ff]);
    Found { frozen: ms[0], planned: ms[1], forced: [ms[2], ms[3], ms[4], ms[5]] }
}
