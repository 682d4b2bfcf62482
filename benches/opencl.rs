//! Matrix products on an OpenCL device, in GFLOP/s: the products of layers, forward and for dx.
//!
//! `cargo bench --features opencl --bench opencl` takes the first device; `-- 1` takes another one.

use std::time::Instant;

use randlora::{DType, Device, Result, Tensor};

/// Tokens, inputs and outputs.
const SHAPES: [(usize, usize, usize); 6] = [
    (512, 384, 384),
    (2048, 384, 384),
    (2048, 384, 1536),
    (2048, 768, 768),
    (2048, 768, 3072),
    (4096, 4096, 4096),
];
/// A product is repeated for about so many seconds.
const AT_LEAST: f64 = 0.5;

fn main() -> Result<()> {
    let index = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(0);
    let device = match Device::opencl(index) {
        Ok(device) => device,
        Err(error) => {
            println!("not measured: {error}");
            return Ok(());
        }
    };
    println!("{device}\n{:>16} {:>12} {:>12}", "T×in→out", "x·Wᵀ GFLOP/s", "dy·W GFLOP/s");
    for (tokens, inputs, outputs) in SHAPES {
        let ones = |dims: [usize; 2]| Tensor::ones(dims, DType::F32, &device);
        let (x, w, dy) = (ones([tokens, inputs])?, ones([outputs, inputs])?, ones([tokens, outputs])?);
        let flops = 2.0 * (tokens * inputs * outputs) as f64;
        let turned = w.t()?;
        let (forward, back) = (seconds(|| x.matmul(&turned))?, seconds(|| dy.matmul(&w))?);
        println!(
            "{:>16} {:>12.1} {:>12.1}",
            format!("{tokens}×{inputs}→{outputs}"),
            flops / forward / 1e9,
            flops / back / 1e9
        );
    }
    Ok(())
}

/// The time of one run, with the device waited for once for all of them.
fn seconds(run: impl Fn() -> Result<Tensor>) -> Result<f64> {
    let all = |repeats: usize| -> Result<f64> {
        let start = Instant::now();
        let mut last = run()?;
        for _ in 1..repeats {
            last = run()?;
        }
        last.slice(0, 0..1)?.to_vec::<f32>()?;
        Ok(start.elapsed().as_secs_f64())
    };
    // The first run builds the kernels.
    all(1)?;
    let repeats = (AT_LEAST / all(1)?).ceil().max(1.0) as usize;
    Ok(all(repeats)? / repeats as f64)
}
