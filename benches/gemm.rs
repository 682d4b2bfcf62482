//! GEMM at the shapes of a transformer's layers: f32 GFLOP/s of x·Wᵀ with one thread and with all.
//!
//! `cargo bench --bench gemm`

mod common;

use randlora::{DType, Device, Tensor};

fn main() {
    let device = Device::cpu();
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    println!(
        "{:>18} {:>10} {:>10}  threads: 1, {}",
        "T×in→out",
        "1 thread",
        "all",
        rayon::current_num_threads()
    );
    for (t, inputs, outputs) in
        [(2048, 768, 768), (2048, 768, 3072), (4096, 384, 384), (128, 768, 768), (1, 768, 768)]
    {
        let x = Tensor::full(0.5, [t, inputs], DType::F32, &device).expect("x");
        let w = Tensor::full(0.1, [outputs, inputs], DType::F32, &device).expect("W");
        let flops = 2.0 * (t * inputs * outputs) as f64;
        let repeat = (2e8 / flops).ceil() as usize;
        let product = || {
            for _ in 0..repeat {
                x.linear(&w, None).expect("they fit");
            }
        };
        let ms = common::medians(9, &mut [&mut || one.install(product), &mut || product()]);
        let gflops = |ms: f64| flops * repeat as f64 / ms / 1e6;
        println!("{:>18} {:>10.0} {:>10.0}", format!("{t}×{inputs}→{outputs}"), gflops(ms[0]), gflops(ms[1]));
    }
}
