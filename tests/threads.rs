//! The same input gives the same bits, whatever the number of threads. (That training a whole model
//! does too is shown in src/train.rs and, for the demo's kind of model, src/models/vit.rs.)

use std::sync::Arc;

use randlora::adapters::{BasesSpec, Distribution};
use randlora::nn::Init;
use randlora::{
    AttentionOptions, DType, Device, DropoutKey, Ids, Pairing, RandLoraOptions, Result, Structure, Tensor,
    lora_linear, randlora_linear,
};

const THREADS: [usize; 4] = [1, 2, 3, 7];

/// Sizes from a seed: from the very small to what several threads share.
fn sizes<const N: usize>(seed: u64) -> [usize; N] {
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678;
    std::array::from_fn(|_| {
        z = (z ^ (z >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        1 + (z >> 33) as usize % [8, 70, 200, 420][(z >> 20) as usize % 4]
    })
}

/// Normal numbers that depend on the name alone.
fn normal(name: &str, dims: &[usize]) -> Result<Tensor> {
    Init::seeded(3, &Device::cpu()).normal(name, dims, 1.0)
}

/// The result and the gradients of all inputs.
fn with_gradients(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<Vec<Tensor>> {
    let tracked: Vec<Tensor> = inputs.iter().map(Tensor::track).collect();
    let y = f(&tracked)?;
    let gradients = y.backward_from(&normal("dy", y.dims())?)?;
    let mut all = vec![y.detach()];
    for x in &tracked {
        all.push(gradients.of(x)?.clone());
    }
    Ok(all)
}

/// One of the operations that split their work, at sizes that follow from the seed.
fn program(seed: u64) -> Result<Vec<Tensor>> {
    let [a, b, c, d] = sizes(seed);
    let x = normal("x", &[a, b])?;
    match seed % 10 {
        0 => with_gradients(&[x, normal("w", &[b, c])?], |x| x[0].matmul(&x[1])),
        1 => with_gradients(&[normal("x", &[a % 20 + 1, b, 40])?, normal("w", &[a % 20 + 1, c, 40])?], |x| {
            x[0].matmul(&x[1].t()?)
        }),
        2 if seed % 20 < 10 => with_gradients(&[x, normal("w", &[c, b])?, normal("b", &[c])?], |x| {
            x[0].linear(&x[1], Some(&x[2]))
        }),
        2 => {
            let (w, rank) = (normal("w", &[c, b])?, d % 30 + 1);
            let inputs = [x, normal("a", &[rank, b])?, normal("b", &[c, rank])?];
            with_gradients(&inputs, |x| lora_linear(&x[0], &w, None, [&x[1], &x[2]], 0.3))
        }
        3 => {
            let ternary = Distribution::Ternary { sparsity: 16.0 };
            let spec = BasesSpec {
                seed,
                distribution: if seed % 60 < 40 { Distribution::Uniform } else { ternary },
                structure: if seed % 40 < 20 { Structure::Dense } else { Structure::Block },
                rank: d % 30 + 1,
                small: b.min(c),
                large: b.max(c),
                pairing: Pairing::Paper,
            };
            let n = spec.small.div_ceil(spec.rank);
            let w = normal("w", &[c, b])?;
            let bases = Arc::new(spec.generate(&Device::cpu())?);
            let dropout = (seed % 20 == 3).then_some((0.2, DropoutKey { seed, step: 0, site: 0 }));
            let options = RandLoraOptions { bases, scale: 0.3, dropout, ways: None };
            let inputs = [x, normal("l", &[spec.rank, n])?, normal("g", &[n, spec.small])?];
            with_gradients(&inputs, |x| randlora_linear(&x[0], &w, None, &x[1], &x[2], &options))
        }
        4 => with_gradients(&[normal("x", &[a, b, c % 30 + 1])?], |x| {
            x[0].softmax(1)?.mul(&x[0].log_softmax(2)?)
        }),
        5 => with_gradients(&[normal("x", &[a, b, c % 30 + 1])?], |x| {
            x[0].sum(&[0, 2], false)?.add(&x[0].max(&[0, 2], false)?)
        }),
        6 => with_gradients(&[normal("x", &[a * 4, b])?, normal("w", &[b])?, normal("b", &[b])?], |x| {
            x[0].layer_norm(Some(&x[1]), Some(&x[2]), 1e-5)?.gelu()
        }),
        7 => {
            let shape = [a % 4 + 1, b % 5 + 1, c, d % 40 + 1];
            let options = AttentionOptions { causal: true, ..AttentionOptions::default() };
            let inputs = [normal("q", &shape)?, normal("k", &shape)?, normal("v", &shape)?];
            with_gradients(&inputs, |x| x[0].attention(&x[1], &x[2], &options))
        }
        8 => {
            let ids = Ids::new((0..(a * 9) as u32).map(|i| i * 7 % b as u32).collect::<Vec<_>>(), [a * 9])?;
            with_gradients(&[normal("table", &[b, c])?], |x| x[0].embedding(&ids))
        }
        _ => {
            let key = DropoutKey { seed, step: 1, site: 2 };
            let targets: Vec<u32> = (0..a as u32 * 3).map(|i| i % b as u32).collect();
            with_gradients(&[normal("x", &[a * 3, b])?], |x| {
                let loss = x[0].dropout(0.3, key)?.cross_entropy(&targets, None, 0.1)?;
                loss.mul(&x[0].mean_all()?)?.reshape([1])
            })
        }
    }
}

/// The bits of all elements.
fn bits(tensors: Vec<Tensor>) -> Vec<u32> {
    tensors
        .iter()
        .flat_map(|t| t.to_dtype(DType::F32).unwrap().to_vec::<f32>().unwrap())
        .map(f32::to_bits)
        .collect()
}

/// Products that are shared by threads though the result has few rows, and such as read a small factor often.
#[test]
fn thin_products_give_the_same_bits_on_any_number_of_threads() {
    let pools = THREADS.map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap());
    for [m, k, n] in [[1, 3001, 2001], [2, 2048, 2048], [7, 1024, 1024], [2000, 64, 96], [3000, 2000, 1]] {
        let product = || -> Result<Vec<u32>> {
            let (x, w) = (normal("x", &[m, k])?, normal("w", &[k, n])?);
            let turned = normal("w", &[n, k])?;
            Ok(bits(vec![x.matmul(&w)?, x.linear(&turned, None)?, x.matmul(&turned.t()?)?]))
        };
        let results = pools.each_ref().map(|pool| pool.install(product).unwrap());
        assert!(results.iter().all(|result| *result == results[0]), "{m}×{k}→{n}");
    }
}

#[test]
fn two_hundred_shapes_give_the_same_bits_on_any_number_of_threads() {
    let pools = THREADS.map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap());
    for seed in 0..200 {
        let results = pools.each_ref().map(|pool| bits(pool.install(|| program(seed)).unwrap()));
        for (threads, result) in THREADS.iter().zip(&results) {
            assert!(*result == results[0], "seed {seed}: {threads} threads differ from one");
        }
    }
}
