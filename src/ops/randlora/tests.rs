//! The cases for the shared checks: each way for both orientations, and what only this operation
//! promises.

use super::*;
use crate::cpu::naive::Naive;
use crate::device::Device;
use crate::dtype::DType;
use crate::ops::cases::Case;
use crate::ops::dropout::mask_range;
use crate::random;

const KEY: DropoutKey = DropoutKey { seed: 3, step: 1, site: 4 };

/// Normal numbers.
fn numbers(n: usize, seed: u64) -> Vec<f64> {
    let mut words = vec![0; n];
    random::words(seed, 0, 0, &mut words);
    // As f32 numbers, so that both precisions start from the same ones.
    words.into_iter().map(|w| random::normal(w) as f32 as f64).collect()
}

fn tensor(dims: &[usize], seed: u64, dtype: DType) -> Tensor {
    let values = numbers(dims.iter().product(), seed);
    Tensor::from_vec(values, dims, &Device::cpu()).unwrap().to_dtype(dtype).unwrap()
}

#[derive(Clone, Copy)]
enum Kind {
    Dense(Pairing),
    Block,
    Ternary(Pairing),
}

/// Bases somewhat larger than the layer needs, as those of a model are.
fn bases(sizes: Sizes, kind: Kind, dtype: DType) -> Arc<Bases> {
    let a = tensor(&[sizes.rank, sizes.small() + 2], 11, dtype);
    let (large, n, rank) = (sizes.large() + 3, sizes.bases() + 1, sizes.rank);
    let made = match kind {
        Kind::Dense(pairing) => Bases::new(&a, &tensor(&[large, n, rank], 12, dtype), pairing),
        Kind::Block => Bases::block(&a, &tensor(&[large, rank], 12, dtype), 3),
        Kind::Ternary(pairing) => {
            // Zeros in the rows that no layer reads, for the share of them that makes bases ternary.
            let mut b = numbers(large * n * rank, 12);
            b.iter_mut().for_each(|b| *b = if b.abs() > 0.6 { 1.5 * b.signum() } else { 0.0 });
            b[0] = -1.5;
            b.resize(8 * large * n * rank, 0.0);
            let b = Tensor::from_vec(b, [8 * large, n, rank], &Device::cpu()).unwrap();
            Bases::new(&a, &b.to_dtype(dtype).unwrap(), pairing)
        }
    };
    let bases = made.unwrap();
    assert_eq!(matches!(bases.form(), Form::Ternary { .. }), matches!(kind, Kind::Ternary(_)));
    Arc::new(bases)
}

/// ΔW by the formula, an element at a time: out×in.
fn naive_delta(sizes: Sizes, bases: &Bases, scale: f64, lambda: &[f64], gamma: &[f64]) -> Naive {
    let (r, n, m) = (sizes.rank, sizes.bases(), sizes.small());
    let a = bases.a().to_dtype(DType::F64).unwrap().to_vec::<f64>().unwrap();
    let b = bases.b().unwrap().to_dtype(DType::F64).unwrap().to_vec::<f64>().unwrap();
    let a_width = bases.a().dims()[1];
    let b_at = |large: usize, q: usize| match bases.structure() {
        Structure::Dense => b[(large * bases.b_shape().dims()[1] + q / r) * r + q % r],
        Structure::Block if large / r % n == q / r => (n as f64 / 3.0).sqrt() * b[large * r + q % r],
        Structure::Block => 0.0,
    };
    let element = |large: usize, small: usize| {
        (0..n * r)
            .map(|q| {
                let (i, k) = match bases.pairing() {
                    Pairing::Paper => (q / r, q % r),
                    Pairing::Peft => (q % n, q / n),
                };
                b_at(large, q) * lambda[k * n + i] * a[k * a_width + small] * gamma[i * m + small]
            })
            .sum::<f64>()
            * scale
    };
    Naive::build(&[sizes.outputs, sizes.inputs], |i| {
        if sizes.inputs <= sizes.outputs { element(i[0], i[1]) } else { element(i[1], i[0]) }
    })
}

/// A case's inputs: x, W0, bias; λ and γ are flat vectors of fixed size, so that their sizes follow
/// from the weight's whatever that is.
fn case(
    name: &'static str,
    inputs: &'static [&'static str],
    rank: usize,
    ways: (Way, Way),
    kind: Kind,
    dropout: bool,
) -> Case {
    let sizes = move |x: &[usize], w: &[usize]| Sizes {
        tokens: x[..x.len() - 1].iter().product(),
        inputs: w[1],
        outputs: w[0],
        rank,
    };
    let dropout = dropout.then_some((0.4, KEY));
    let run = move |x: &[&Tensor]| {
        let sizes = sizes(x[0].dims(), x[1].dims());
        let bases = bases(sizes, kind, x[0].dtype());
        let lambda = x[2].slice(0, 0..rank * sizes.bases())?.reshape([rank, sizes.bases()])?;
        let gamma =
            x[3].slice(0, 0..sizes.bases() * sizes.small())?.reshape([sizes.bases(), sizes.small()])?;
        let options = RandLoraOptions { bases, scale: 0.7, dropout, ways: Some(ways) };
        randlora_linear(x[0], &x[1].detach(), x.get(4).copied(), &lambda, &gamma, &options)
    };
    let naive = move |x: &[Naive]| {
        let sizes = sizes(&x[0].dims, &x[1].dims);
        let delta = naive_delta(sizes, &bases(sizes, kind, DType::F64), 0.7, &x[2].data, &x[3].data);
        let mut mask = vec![1.0; x[0].data.len()];
        if let Some((p, key)) = dropout {
            mask_range(key, p, 0, &mut mask);
        }
        let mut dims = x[0].dims.clone();
        let last = dims.len() - 1;
        dims[last] = sizes.outputs;
        let mask = Naive { dims: x[0].dims.clone(), data: mask };
        Naive::build(&dims, |i| {
            let o = i[last];
            let at = |j: usize| [&i[..last], &[j]].concat();
            let sum: f64 = (0..sizes.inputs)
                .map(|j| x[0].at(&at(j)) * (x[1].at(&[o, j]) + mask.at(&at(j)) * delta.at(&[o, j])))
                .sum();
            sum + x.get(4).map_or(0.0, |b| b.at(&[o]))
        })
    };
    Case::new(name, inputs, run, naive).at_least(1).frozen(1)
}

pub(crate) fn cases() -> Vec<Case> {
    use Way::{Factored, Panel};
    let (paper, peft) = (Kind::Dense(Pairing::Paper), Kind::Dense(Pairing::Peft));
    let (block, ternary) = (Kind::Block, Kind::Ternary(Pairing::Paper));
    let (pp, pf, fp, ff) = ((Panel, Panel), (Panel, Factored), (Factored, Panel), (Factored, Factored));
    // The numbers at the end of λ and γ are what the largest size needs; see `sizes` in `cases.rs`.
    let tall: &[&str] = &["t 3", "7 3", "6", "6", "7"];
    let wide: &[&str] = &["a t 7", "3 7", "6", "6"];
    let free: &[&str] = &["t i", "o i", "1800", "1800", "o"];
    let mut cases = vec![
        case("randlora, any sizes, panel", free, 2, pp, paper, false),
        case("randlora, any sizes, factored", free, 2, ff, paper, false),
        case("randlora, any sizes, r 1", free, 1, pf, paper, false),
        case("randlora, any sizes, r 3", free, 3, fp, peft, false),
        case("randlora, r = min", &["t 3", "7 3", "3", "3"], 3, pp, paper, false),
        case("randlora, r > min", &["t 3", "7 3", "5", "3"], 5, pp, paper, false),
        case("randlora, r > min, factored", &["t 7", "3 7", "5", "3"], 5, ff, paper, false),
        case("block bases, any sizes, panel", free, 2, pp, block, false),
        case("block bases, any sizes, factored", free, 2, ff, block, false),
        case("block bases, any sizes, r 1", free, 1, pf, block, false),
        case("block bases, any sizes, r 3", free, 3, fp, block, false),
        case("block bases, r = min", &["t 3", "7 3", "3", "3"], 3, pp, block, false),
        case("block bases, r > min", &["t 7", "3 7", "5", "3"], 5, pp, block, false),
        case("block bases, r > min, factored", &["t 3", "7 3", "5", "3"], 5, ff, block, false),
        case("ternary bases, any sizes, panel", free, 2, pp, ternary, false),
        case("ternary bases, any sizes, factored", free, 2, ff, ternary, false),
        case("ternary bases, any sizes, r 1", free, 1, pf, ternary, false),
        case("ternary bases, any sizes, r 3", free, 3, fp, Kind::Ternary(Pairing::Peft), false),
        case("ternary bases, r > min", &["t 7", "3 7", "5", "3"], 5, pp, ternary, false),
        case("ternary bases, r > min, factored", &["t 3", "7 3", "5", "3"], 5, ff, ternary, false),
    ];
    for (kind, names, inputs) in [
        (paper, ["in < out: pp", "in < out: pf", "in < out: fp", "in < out: ff"], tall),
        (paper, ["in > out: pp", "in > out: pf", "in > out: fp", "in > out: ff"], wide),
        (
            block,
            ["blocks, in < out: pp", "blocks, in < out: pf", "blocks, in < out: fp", "blocks, in < out: ff"],
            tall,
        ),
        (
            block,
            ["blocks, in > out: pp", "blocks, in > out: pf", "blocks, in > out: fp", "blocks, in > out: ff"],
            wide,
        ),
        (ternary, ["±1, in < out: pp", "±1, in < out: pf", "±1, in < out: fp", "±1, in < out: ff"], tall),
        (ternary, ["±1, in > out: pp", "±1, in > out: pf", "±1, in > out: fp", "±1, in > out: ff"], wide),
    ] {
        for (name, ways) in names.into_iter().zip([pp, pf, fp, ff]) {
            cases.push(case(name, inputs, 2, ways, kind, false));
        }
    }
    for (name, inputs, ways, kind) in [
        ("in < out: pp, dropout", tall, pp, peft),
        ("in < out: ff, dropout", tall, ff, peft),
        ("in > out: pp, dropout", wide, pp, peft),
        ("in > out: ff, dropout", wide, ff, peft),
        ("in > out: pf, dropout", wide, pf, peft),
        ("blocks, in < out: pp, dropout", tall, pp, block),
        ("blocks, in < out: ff, dropout", tall, ff, block),
        ("blocks, in > out: pp, dropout", wide, pp, block),
        ("blocks, in > out: ff, dropout", wide, ff, block),
        ("blocks, in > out: fp, dropout", wide, fp, block),
        ("±1, in < out: pp, dropout", tall, pp, ternary),
        ("±1, in < out: ff, dropout", tall, ff, ternary),
        ("±1, in > out: pf, dropout", wide, pf, ternary),
        ("±1, in > out: fp, dropout", wide, fp, ternary),
    ] {
        cases.push(case(name, inputs, 2, ways, kind, true));
    }
    cases
}
