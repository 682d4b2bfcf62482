//! Layers' products in bf16 next to f32: GFLOP/s a core of x·Wᵀ, of dy·W and of dyᵀ·x, on one thread and on
//! all of them at once.
//!
//! `cargo bench --bench bf16`, on a processor with AMX, or AVX512-BF16 of AMD's; with `-- 768→768`, only such shapes.

mod common;

use randlora::{DType, Device, Precision, Tensor};

fn main() {
    if !Precision::Bf16.is_native() {
        println!("this processor has no fast instructions for bf16: there is nothing to compare");
        return;
    }
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    let threads = rayon::current_num_threads();
    println!(
        "GFLOP/s a core{:>16} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "f32, 1", "bf16, 1", "ratio", "f32", "bf16", "ratio"
    );
    println!("{:>30} {:>35}", "", format!("(on {threads} threads)"));
    let only = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    for (t, inputs, outputs) in [
        (2048, 768, 768),
        (2048, 384, 1536),
        (2048, 1536, 384),
        (2048, 768, 3072),
        (2048, 3072, 768),
        (4096, 384, 384),
        (256, 768, 768),
        (64, 768, 768),
    ] {
        let flops = 2.0 * (t * inputs * outputs) as f64;
        let shape = format!("{t}×{inputs}→{outputs}");
        if only.as_ref().is_some_and(|only| !shape.contains(only.as_str())) {
            continue;
        }
        let repeat = (2e9 / flops).ceil() as usize;
        let layer = |precision| {
            let device = Device::with_precision(precision);
            let full = |dims| Tensor::full(0.5, dims, DType::F32, &device).expect("memory");
            (full([t, inputs]), full([outputs, inputs]), full([t, outputs]))
        };
        let layers = [layer(Precision::F32), layer(Precision::Bf16)];
        for (name, gradients) in [("x·Wᵀ", None), ("dy·W", Some(true)), ("dyᵀ·x", Some(false))] {
            let product = |(x, w, dy): &(Tensor, Tensor, Tensor)| {
                let (x, w) = match gradients {
                    None => (x.clone(), w.clone()),
                    Some(of_input) => {
                        if of_input {
                            (x.track(), w.clone())
                        } else {
                            (x.clone(), w.track())
                        }
                    }
                };
                let y = x.linear(&w, None).expect("they fit");
                if gradients.is_some() {
                    y.backward_from(dy).expect("a gradient");
                }
            };
            let run = |layer| (0..repeat).for_each(|_| product(layer));
            let ms = common::medians(
                7,
                &mut [
                    &mut || one.install(|| run(&layers[0])),
                    &mut || one.install(|| run(&layers[1])),
                    &mut || run(&layers[0]),
                    &mut || run(&layers[1]),
                ],
            );
            // A gradient comes after the forward product.
            let products = if gradients.is_some() { 2 } else { 1 };
            let speed = |ms: f64, cores: usize| flops * (repeat * products) as f64 / ms / 1e6 / cores as f64;
            println!(
                "{:>14} {name:>6} {:>8.0} {:>8.0} {:>8.2} {:>8.0} {:>8.0} {:>8.2}",
                shape,
                speed(ms[0], 1),
                speed(ms[1], 1),
                ms[0] / ms[1],
                speed(ms[2], threads),
                speed(ms[3], threads),
                ms[2] / ms[3]
            );
        }
    }
}
