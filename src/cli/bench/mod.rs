//! `randlora bench`: what a layer and a training step cost on this machine.
//!
//! With `--json` the result is one object. Times are medians in milliseconds, memory is in bytes.
//!
//! | of | fields |
//! |---|---|
//! | a layer | `tokens`, `in`, `out`, `rank`, `bases`, `precision`, `device`, `dropout`, `threads`, `rounds`; `frozen_ms`, `full_ms`, `lora_ms`, `randlora_ms`; `lora_factor` and `randlora_factor` over the frozen layer; `flop_ratio`: RandLoRA's floating point operations over the frozen layer's, what `randlora_factor` would be at the same speed; `route` {`forward`, `backward`: "panel" or "factored"}; `frozen_gflops`, `gflops`: 10⁹ floating point operations a second of the frozen layer and of RandLoRA; `scratch_bytes`: the most that RandLoRA's operation held beside its results (on the CPU; on an OpenCL device the most that its pool had in use beside the inputs); `opencl`: null, or for one forward and backward of RandLoRA {`launches`, `waits`, `bytes_up`, `bytes_down`} |
//! | a step | `method`, `rank` (null for full and head), `bases` (null but for randlora), `precision` ("f32" or "bf16": what was computed in), `device`, `batch_size`, `length`, `threads`, `steps`, `checkpoint_activations`, `trained_parameters`; `step_ms`, `tokens_per_s`; `tensor_peak_bytes`: the most that tensors held, without a mapped model; `peak_rss_bytes`: the most that the process held (null where the system does not tell); `opencl`: null, or {`launches`, `waits`, `bytes_up`, `bytes_down`} of a step |

mod layer;
mod step;

use std::time::Instant;

use clap::Subcommand;
use randlora::{Device, OpenClCounts, Result};
use serde_json::{Value, json};

use super::Failure;
use super::output::size;

/// Measure what a layer or a training step costs on this machine.
#[derive(Debug, clap::Args)]
#[command(arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Layer(layer::Args),
    Step(step::Args),
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> std::result::Result<(), Failure> {
    match &args.what {
        What::Layer(args) => layer::run(args),
        What::Step(args) => step::run(args),
    }
}

/// The middle of some times, in milliseconds.
fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).map_or(0.0, |seconds| seconds * 1e3)
}

/// A short function is repeated for about so many seconds, and timed as a whole.
const AT_LEAST: f64 = 0.01;

/// The median time of each function in milliseconds, over `rounds` rounds in which each has its turn: what
/// else the machine does hits all of them alike.
fn medians<const N: usize>(
    rounds: usize,
    device: &Device,
    mut runs: [&mut dyn FnMut() -> Result<()>; N],
) -> Result<[f64; N]> {
    let mut repeats = [1; N];
    for (run, repeats) in runs.iter_mut().zip(&mut repeats) {
        run()?; // Warm up.
        *repeats = (AT_LEAST / seconds(1, device, run)?.max(1e-6)).ceil() as usize;
    }
    let mut times = [const { vec![] }; N];
    for _ in 0..rounds {
        for ((run, &repeats), times) in runs.iter_mut().zip(&repeats).zip(&mut times) {
            times.push(seconds(repeats, device, run)? / repeats as f64);
        }
    }
    Ok(times.map(median))
}

/// How long so many runs take until all is done.
fn seconds(repeats: usize, device: &Device, run: &mut &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    for _ in 0..repeats {
        run()?;
    }
    device.synchronize()?;
    Ok(start.elapsed().as_secs_f64())
}

/// What an OpenCL device was asked for between two counts, for one of so many runs; null on the CPU.
fn asked(device: &Device, before: OpenClCounts, runs: usize) -> Value {
    let Device::OpenCl(_) = device else { return Value::Null };
    let after = device.opencl_counts();
    let each = |after: usize, before: usize| (after - before) / runs.max(1);
    json!({
        "launches": each(after.launches, before.launches),
        "waits": each(after.waits, before.waits),
        "bytes_up": each(after.bytes_up, before.bytes_up),
        "bytes_down": each(after.bytes_down, before.bytes_down),
    })
}

/// The lines of a table for that.
fn asked_lines(value: &Value) -> Vec<Vec<String>> {
    let whole = |field: &str| value["opencl"][field].as_u64();
    let Some((launches, waits)) = whole("launches").zip(whole("waits")) else { return vec![] };
    let [up, down] = ["bytes_up", "bytes_down"].map(|field| size(whole(field).unwrap_or(0)));
    vec![
        line("device", value["device"].as_str().unwrap_or_default()),
        line("kernels", format!("{launches} launched, waited for {waits} times, {up} there, {down} back")),
    ]
}

/// A number of a result.
fn number(value: &Value, field: &str) -> f64 {
    value[field].as_f64().unwrap_or(f64::NAN)
}

/// A line of a table with a name and a value.
fn line(name: &str, value: impl Into<String>) -> Vec<String> {
    vec![name.into(), value.into()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_turn_and_the_middle_counts() {
        assert_eq!([median(vec![]), median(vec![3.0, 1.0, 2.0])], [0.0, 2000.0]);
        let sleep = |ms| std::thread::sleep(std::time::Duration::from_millis(ms));
        let (mut long, mut short) = (0, 0);
        let found = medians(
            3,
            &Device::cpu(),
            [
                &mut || {
                    long += 1;
                    sleep(20);
                    Ok(())
                },
                &mut || {
                    short += 1;
                    sleep(1);
                    Ok(())
                },
            ],
        );
        let [of_long, of_short] = found.unwrap();
        assert!(of_long >= 20.0 && (1.0..20.0).contains(&of_short), "{of_long} {of_short}");
        assert!(long == 2 + 3 && short > 2 + 3, "{long} {short}");
    }
}
