//! One linear layer, forward and backward: RandLoRA (r = 32) over the frozen layer, with dense and with
//! block bases, both ways of each half and the plan's choice, next to the ratio of floating point
//! operations.
//!
//! `cargo bench --bench randlora`; with `-- grid` how good the plan's choice is over many shapes.

mod common;

use std::sync::Arc;

use randlora::adapters::{BasesSpec, Distribution};
use randlora::{
    DType, Device, Pairing, Plan, RandLoraOptions, Sizes, Structure, Tensor, Wants, Way, randlora_linear,
};

const WANTS: Wants = Wants { diagonals: true, input: true, dropout: false };

fn main() {
    if std::env::args().any(|argument| argument == "grid") {
        return grid();
    }
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
    for structure in [Structure::Dense, Structure::Block] {
        for (tokens, inputs, outputs) in shapes {
            let sizes = Sizes { tokens, inputs, outputs, rank: 32 };
            let found = measure(sizes, structure, 11);
            let plan = Plan::new(sizes, WANTS, structure);
            let flops = 1.0 + plan.extra_flops(sizes, WANTS) / Plan::frozen_flops(sizes, WANTS);
            let [pp, pf, fp, ff] = found.forced.map(|ms| ms / found.frozen);
            println!(
                "{:>18} {:>6} {:>10.2} {:>9.2} {:>7.2} {flops:>7.2} | {pp:>6.2} {pf:>6.2} {fp:>6.2} {ff:>6.2}",
                format!("{tokens}×{inputs}→{outputs}"),
                if structure == Structure::Dense { "dense" } else { "block" },
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
    for structure in [Structure::Dense, Structure::Block] {
        for small in [256, 384] {
            for (factor, tokens) in [1, 2, 4, 8].into_iter().flat_map(|f| TOKENS.map(|t| (f, t))) {
                let sizes = Sizes { tokens, inputs: small, outputs: factor * small, rank: 32 };
                let plan = Plan::new(sizes, WANTS, structure);
                let found = measure(sizes, structure, if tokens > 1024 { 5 } else { 15 });
                let place = WAYS.iter().position(|&ways| ways == (plan.forward, plan.backward)).unwrap_or(0);
                let best = (0..4).min_by(|&a, &b| found.forced[a].total_cmp(&found.forced[b])).unwrap_or(0);
                let over = found.forced[place] / found.forced[best];
                println!(
                    "{:>6} {:>18} {:>6} {:>6} {over:>5.2}{}  {}",
                    if structure == Structure::Dense { "dense" } else { "block" },
                    format!("{tokens}×{small}→{}", factor * small),
                    NAMES[place],
                    NAMES[best],
                    if over > 1.1 { "*" } else { " " },
                    found.forced.map(|ms| format!("{:.2}", ms / found.frozen)).join(" "),
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

fn measure(sizes: Sizes, structure: Structure, rounds: usize) -> Found {
    let device = Device::cpu();
    let full = |value, dims: [usize; 2]| Tensor::full(value, dims, DType::F32, &device).expect("memory");
    let spec = BasesSpec {
        seed: 0,
        distribution: Distribution::Uniform,
        structure,
        rank: sizes.rank,
        small: sizes.small(),
        large: sizes.large(),
        pairing: Pairing::Paper,
    };
    let bases = Arc::new(spec.generate(&device).expect("sensible sizes"));
    let x = full(0.5, [sizes.tokens, sizes.inputs]).track();
    let weight = full(0.1, [sizes.outputs, sizes.inputs]);
    let lambda = full(0.2, [sizes.rank, sizes.bases()]).track();
    let gamma = full(0.3, [sizes.bases(), sizes.small()]).track();
    let dy = full(1.0, [sizes.tokens, sizes.outputs]);

    let mut frozen = || {
        x.linear(&weight, None).and_then(|y| y.backward_from(&dy)).expect("they fit");
    };
    let with = |ways| {
        let (x, weight, lambda, gamma, dy) = (&x, &weight, &lambda, &gamma, &dy);
        let options = RandLoraOptions { bases: bases.clone(), scale: 1.0, dropout: None, ways };
        move || {
            let y = randlora_linear(x, weight, None, lambda, gamma, &options);
            y.and_then(|y| y.backward_from(dy)).expect("they fit");
        }
    };
    let [mut pp, mut pf, mut fp, mut ff] = WAYS.map(|ways| with(Some(ways)));
    let mut planned = with(None);
    let ms = common::medians(rounds, &mut [&mut frozen, &mut planned, &mut pp, &mut pf, &mut fp, &mut ff]);
    Found { frozen: ms[0], planned: ms[1], forced: [ms[2], ms[3], ms[4], ms[5]] }
}
