//! OpenCL from outside: training follows the CPU's, adapters are the same files, memory keeps its contract.
//! Without a device there is nothing to test, which under CI is a failure.

use std::sync::Arc;

use crate::common::{Folder, oracle};
use randlora::adapters::{BasesSpec, Distribution, Lora, Method, RandLora, Targets, attach};
use randlora::io::{Access, Checkpoint, PeftTask, save_adapter};
use randlora::models::{Bert, BertLoad};
use randlora::nn::{Context, TokenBatch, TokenIds};
use randlora::optim::{AdamW, Optimizer, clip_gradients};
use randlora::{
    DType, Device, DropoutKey, Pairing, RandLoraOptions, Result, Structure, Tensor, Way, randlora_linear,
};

fn device() -> Option<Device> {
    match Device::opencl(0) {
        Ok(device) => Some(device),
        Err(error) if std::env::var_os("CI").is_some_and(|ci| ci == "true") => panic!("{error}"),
        Err(error) => {
            eprintln!("not tested: {error}");
            None
        }
    }
}

fn model(device: &Device) -> Result<Bert> {
    let checkpoint = Checkpoint::open(&oracle("peft_training/model"), Access::Map)?;
    Ok(Bert::load(&checkpoint, BertLoad { labels: Some(2), seed: 0 }, device)?.0)
}

/// Texts of different lengths, so that some of the keys are padding.
fn batch(step: u32) -> (TokenBatch, Vec<u32>) {
    let text = |i: u32| TokenIds {
        ids: (0..4 + i % 5).map(|j| 2 + (7 * step + 13 * i + 5 * j) % 45).collect(),
        ..TokenIds::default()
    };
    let texts: Vec<TokenIds> = (0..8).map(text).collect();
    (TokenBatch::pad(&texts.iter().collect::<Vec<_>>(), 0).unwrap(), (0..8).map(|i| i % 2).collect())
}

/// The losses of so many steps without dropout, and the model after them.
fn train(device: &Device, method: &dyn Method, steps: u32) -> Result<(Vec<f64>, Bert)> {
    let mut model = model(device)?;
    attach(&mut model, method, &Targets::names(&["query", "key", "value", "dense"]), &["classifier"])?;
    let (mut optimizer, mut losses) = (AdamW::new(), vec![]);
    for step in 0..steps {
        let (batch, labels) = batch(step % 3);
        let loss = model.forward(&batch, &Context::eval().tracked())?.cross_entropy(&labels, None, 0.0)?;
        losses.push(loss.item()?);
        let mut gradients = loss.backward()?;
        clip_gradients(&model, &mut gradients, 1.0, step as usize)?;
        optimizer.step(&mut model, &gradients, 1e-2)?;
    }
    Ok((losses, model))
}

fn logits(model: &Bert) -> Vec<f32> {
    let logits = model.forward(&batch(0).0, &Context::eval()).unwrap();
    logits.to_device(&Device::cpu()).unwrap().to_vec().unwrap()
}

fn follows(losses: &[f64], want: &[f64]) {
    for (step, (loss, want)) in losses.iter().zip(want).enumerate() {
        assert!((loss - want).abs() <= 1e-3, "step {step}: {loss} where the CPU has {want}");
    }
}

#[test]
fn twenty_losses_follow_the_cpu_and_adapters_are_interchangeable() {
    let Some(gpu) = device() else { return };
    let randlora = |structure| RandLora {
        rank: 4,
        scale: 2.0,
        structure,
        pairing: Pairing::Peft,
        ..RandLora::default()
    };
    let methods: [&dyn Method; 3] =
        [&randlora(Structure::Dense), &randlora(Structure::Block), &Lora::default()];
    for method in methods {
        let (want, _) = train(&Device::cpu(), method, 20).unwrap();
        // The same batch as the first.
        assert!(want[18] < want[0], "{}: there is nothing to follow", method.name());
        let (losses, trained) = train(&gpu, method, 20).unwrap();
        follows(&losses, &want);

        // The file is one for both devices.
        let folder = Folder::with(&format!("opencl-{}", method.name()), &[]);
        save_adapter(&trained, &folder.0, &PeftTask::default()).unwrap();
        let there = logits(&trained);
        let mut here = model(&Device::cpu()).unwrap();
        randlora::io::Adapter::open(&folder.0).unwrap().attach(&mut here).unwrap();
        let mut again = model(&gpu).unwrap();
        randlora::io::Adapter::open(&folder.0).unwrap().attach(&mut again).unwrap();
        for (a, (b, c)) in there.iter().zip(logits(&here).into_iter().zip(logits(&again))) {
            assert!((a - b).abs() < 1e-4 && (a - c).abs() < 1e-4, "{}: {a} {b} {c}", method.name());
        }
    }
    assert!(gpu.round_trips().is_empty(), "{:?}", gpu.round_trips());
}

/// Neither ΔW nor its dense gradient is ever there whole: the pool's peak says so.
#[test]
fn randlora_keeps_its_memory_contract() {
    const MIB: usize = 1 << 20;
    let Some(gpu) = device() else { return };
    // A wide weight, for which the roles of the sides turn, and a tall one.
    let (uniform, ternary) = (Distribution::Uniform, Distribution::very_sparse(256));
    for (structure, distribution, inputs, outputs) in [
        (Structure::Dense, uniform, 256, 16384),
        (Structure::Dense, ternary, 16384, 256),
        (Structure::Block, uniform, 4096, 4096),
        (Structure::Block, uniform, 8192, 2048),
    ] {
        let (tokens, rank) = (8, 16);
        let (small, large) = (inputs.min(outputs), inputs.max(outputs));
        let spec =
            BasesSpec { seed: 0, distribution, structure, rank, small, large, pairing: Pairing::Paper };
        let n = small.div_ceil(rank);
        let x = Tensor::ones([tokens, inputs], DType::F32, &gpu).unwrap().track();
        let w = Tensor::ones([outputs, inputs], DType::F32, &gpu).unwrap();
        let lambda = Tensor::ones([rank, n], DType::F32, &gpu).unwrap().track();
        let gamma = Tensor::ones([n, small], DType::F32, &gpu).unwrap().track();
        let key = DropoutKey { seed: 1, step: 2, site: 3 };
        let bases = Arc::new(spec.generate(&gpu).unwrap());
        let ways = [(Way::Panel, Way::Panel), (Way::Factored, Way::Factored), (Way::Panel, Way::Factored)];
        for (ways, dropout) in ways.into_iter().flat_map(|ways| [(ways, None), (ways, Some((0.1, key)))]) {
            let options = RandLoraOptions { bases: bases.clone(), scale: 1e-3, dropout, ways: Some(ways) };
            let run = || {
                let y = randlora_linear(&x, &w, None, &lambda, &gamma, &options).unwrap();
                let g = y.sum_all().unwrap().backward().unwrap();
                assert!(g.of(&lambda).is_ok() && g.of(&gamma).is_ok() && g.of(&x).is_ok());
            };
            // The first time the bases come to the device.
            run();
            if distribution == ternary {
                // Two bits for each entry of B, and A.
                let all = 4 * (outputs * inputs + tokens * inputs + n * (rank + small) + rank * small);
                assert!(gpu.memory().live_bytes < (all + large * n * rank / 4) * 9 / 8, "B is not packed");
            }
            gpu.reset_peaks();
            let before = gpu.memory().live_bytes;
            run();
            let (extra, weight) = (gpu.memory().peak_bytes - before, 4 * inputs * outputs);
            // A panel of W and one of C of 5 MiB each, the gradients of λ and γ, and some rows of the tokens.
            let scratch = 11 * MIB + 4 * n * (rank + small) + 4 * 4 * tokens * (inputs + outputs);
            assert!(
                extra <= scratch && scratch < weight,
                "{structure:?} {inputs}→{outputs} {ways:?}: {extra} of {weight}"
            );
        }
    }
}
