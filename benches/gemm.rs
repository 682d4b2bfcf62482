//! GEMM at the shapes of a transformer's layers, forward and backward: f32 GFLOP/s with one thread and
//! with all, and the share of what multiply-adds in registers reach in the same run on the same threads.
//!
//! `cargo bench --bench gemm`

mod common;

use std::time::Instant;

use randlora::{DType, Device, Tensor};

fn main() {
    let device = Device::cpu();
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    let threads = rayon::current_num_threads();
    println!("{:>24} {:>10} {:>6} {:>10} {:>6}  threads: 1, {threads}", "", "1 thread", "", "all", "");
    for (t, inputs, outputs) in [
        (2048, 768, 768),
        (2048, 768, 3072),
        (2048, 384, 1536),
        (2048, 1536, 384),
        (4096, 384, 384),
        (128, 768, 768),
        (1, 768, 768),
    ] {
        let full = |value, dims: [usize; 2]| Tensor::full(value, dims, DType::F32, &device).expect("memory");
        let (x, w, dy) = (full(0.5, [t, inputs]), full(0.1, [outputs, inputs]), full(0.2, [t, outputs]));
        let flops = 2.0 * (t * inputs * outputs) as f64;
        // Some 10 ms: what it takes to wake the threads is not what is measured.
        let repeat = (4e9 / flops).ceil() as usize;
        let dy_t = dy.t().expect("a matrix");
        let products: [(&str, &(dyn Fn() + Sync)); 3] = [
            ("x·Wᵀ", &|| drop(x.linear(&w, None).expect("they fit"))),
            ("dy·W", &|| drop(dy.matmul(&w).expect("they fit"))),
            ("dyᵀ·x", &|| drop(dy_t.matmul(&x).expect("they fit"))),
        ];
        for (name, product) in products {
            // Within the threads that work, which are not put to sleep for those of the other column.
            let run = || (0..repeat).for_each(|_| product());
            let measured = || {
                let mut best = 0f64;
                let ms = common::medians(9, &mut [&mut || run(), &mut || best = best.max(peak())]);
                (ms[0], best)
            };
            let (of_one, of_all) = (one.install(measured), rayon::scope(|_| measured()));
            let gflops = |ms: f64| flops * repeat as f64 / ms / 1e6;
            let shape = format!("{t}×{inputs}→{outputs} {name}");
            let columns = [of_one, of_all].map(|(ms, peak)| {
                format!("{:>10.0} {:>6}", gflops(ms), format!("{:.0} %", 100.0 * gflops(ms) / peak))
            });
            println!("{shape:>24} {}", columns.join(" "));
        }
    }
}

/// GFLOP/s of multiply-adds on numbers in registers, all threads of the pool together.
fn peak() -> f64 {
    const ROUNDS: usize = 2_000_000;
    let start = Instant::now();
    let flops: usize = rayon::broadcast(|_| multiply_add(ROUNDS)).into_iter().sum();
    flops as f64 / start.elapsed().as_secs_f64() / 1e9
}

/// Multiply-adds in 12 independent chains; how many operations that were. 0 where the vectors of the
/// processor are not known here.
#[cfg(target_arch = "x86_64")]
fn multiply_add(rounds: usize) -> usize {
    use std::arch::x86_64::*;
    use std::hint::black_box;
    macro_rules! chains {
        ($features:literal, $set:ident, $fma:ident, $lanes:literal) => {{
            #[target_feature(enable = $features)]
            fn run(rounds: usize) -> usize {
                let (x, y) = ($set(black_box(0.999)), $set(black_box(0.001)));
                let mut chains = [$set(black_box(0.5)); 12];
                for _ in 0..rounds {
                    chains.iter_mut().for_each(|chain| *chain = $fma(*chain, x, y));
                }
                black_box(chains);
                rounds * chains.len() * 2 * $lanes
            }
            // SAFETY: called only where the features were found.
            unsafe { run(rounds) }
        }};
    }
    if is_x86_feature_detected!("avx512f") {
        chains!("avx512f", _mm512_set1_ps, _mm512_fmadd_ps, 16)
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        chains!("avx2,fma", _mm256_set1_ps, _mm256_fmadd_ps, 8)
    } else {
        0
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn multiply_add(_: usize) -> usize {
    0
}
