//! One linear layer, forward and backward: RandLoRA (r = 32) over the frozen layer, both ways of
//! each half and the plan's choice, next to the ratio of floating point operations.
//!
//! `cargo bench --bench randlora`

mod common;

use std::sync::Arc;

use randlora::adapters::{BasesSpec, Distribution};
use randlora::{DType, Device, Pairing, Plan, RandLoraOptions, Sizes, Tensor, Wants, Way, randlora_linear};

fn main() {
    println!(
        "{:>18} {:>10} {:>9} {:>7} {:>7} | {:>6} {:>6} {:>6} {:>6}  factors; p = panel, f = factored, forward then backward",
        "T×in→out", "frozen ms", "RandLoRA", "factor", "FLOPs", "pp", "pf", "fp", "ff"
    );
    for (t, inputs, outputs) in [
        (2048, 768, 768),
        (2048, 768, 3072),
        (2048, 3072, 768),
        (4096, 384, 384),
        (256, 768, 768),
        (16, 768, 768),
    ] {
        row(Sizes { tokens: t, inputs, outputs, rank: 32 });
    }
}

fn row(sizes: Sizes) {
    use Way::{Factored, Panel};
    let device = Device::cpu();
    let full = |value, dims: [usize; 2]| Tensor::full(value, dims, DType::F32, &device).expect("memory");
    let spec = BasesSpec {
        seed: 0,
        distribution: Distribution::Uniform,
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

    let frozen = || {
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
    let forced = [(Panel, Panel), (Panel, Factored), (Factored, Panel), (Factored, Factored)];
    let [mut pp, mut pf, mut fp, mut ff] = forced.map(|ways| with(Some(ways)));
    let (mut frozen, mut planned) = (frozen, with(None));
    let ms = common::medians(11, &mut [&mut frozen, &mut planned, &mut pp, &mut pf, &mut fp, &mut ff]);

    let wants = Wants { diagonals: true, input: true, dropout: false };
    let base = Plan::frozen_flops(sizes, wants);
    let flops = 1.0 + Plan::new(sizes, wants).extra_flops(sizes, wants) / base;
    let shape = format!("{}×{}→{}", sizes.tokens, sizes.inputs, sizes.outputs);
    print!("{shape:>18} {:>10.2} {:>9.2} {:>7.2} {flops:>7.2} |", ms[0], ms[1], ms[1] / ms[0]);
    println!(" {:>6.2} {:>6.2} {:>6.2} {:>6.2}", ms[2] / ms[0], ms[3] / ms[0], ms[4] / ms[0], ms[5] / ms[0]);
}
