//! Layers computed in bf16, by the emulated instruction: on any processor.

use std::sync::Arc;

use crate::adapters::{self, BasesSpec, Distribution, Lora, Method, RandLora, Targets};
use crate::nn::{Activation, Context, Init, Linear, Module, Parameter};
use crate::optim::{AdamW, Optimizer};
use crate::{
    DType, Device, DropoutKey, Pairing, RandLoraOptions, Result, Structure, Tensor, Way, randlora_linear,
};

const THREADS: [usize; 4] = [1, 2, 3, 7];

/// ‖a − b‖/‖b‖.
fn distance(a: &Tensor, b: &Tensor) -> Result<f64> {
    let (a, b) = (a.to_vec::<f32>()?, b.to_vec::<f32>()?);
    let square = |x: f32| (x as f64).powi(2);
    let off: f64 = a.iter().zip(&b).map(|(&a, &b)| square(a - b)).sum();
    Ok((off / b.iter().map(|&b| square(b)).sum::<f64>()).sqrt())
}

/// A layer's output and gradients on a device; what runs it is picked by `case`.
fn layer(case: usize, device: &Device) -> Result<Vec<Tensor>> {
    let (tokens, inputs, outputs) = [(150, 140, 132), (130, 129, 200), (130, 200, 129)][case % 3];
    let init = Init::seeded(case as u64, device);
    let x = init.normal("x", [tokens, inputs], 1.0)?.track();
    let w = init.normal("w", [outputs, inputs], 0.1)?;
    let bias = init.normal("b", [outputs], 1.0)?;
    let dy = init.normal("dy", [tokens, outputs], 1.0)?;
    let gradients = |y: Tensor, of: &[&Tensor]| -> Result<Vec<Tensor>> {
        let mut all = vec![y.detach()];
        let gradients = y.backward_from(&dy)?;
        of.iter().try_for_each(|x| gradients.of(x).map(|d| all.push(d.clone())))?;
        Ok(all)
    };
    if case < 3 {
        let w = if case == 1 { w.to_dtype(DType::BF16)? } else { w };
        return gradients(x.linear(&w, Some(&bias))?, &[&x]);
    }
    if case < 6 {
        let w = w.track();
        return gradients(x.linear(&w, None)?, &[&x, &w]);
    }
    let (small, large) = (inputs.min(outputs), inputs.max(outputs));
    let (rank, distribution, pairing) = (10, Distribution::Uniform, Pairing::Peft);
    let structure = Structure::Dense;
    let spec = BasesSpec { seed: 1, distribution, structure, rank, small, large, pairing };
    let n = small.div_ceil(rank);
    let lambda = init.normal("l", [rank, n], 0.1)?.track();
    let gamma = init.normal("g", [n, small], 0.1)?.track();
    let way = if case < 12 { Way::Panel } else { Way::Factored };
    let dropout = (case % 2 == 1).then_some((0.2, DropoutKey { seed: 3, step: 1, site: 4 }));
    let options = RandLoraOptions {
        bases: Arc::new(spec.generate(device)?),
        scale: 0.5,
        dropout,
        ways: Some((way, way)),
    };
    let y = randlora_linear(&x, &w, Some(&bias), &lambda, &gamma, &options)?;
    gradients(y, &[&x, &lambda, &gamma])
}

/// All cases: a frozen weight (one of them stored in bf16), a trained one, RandLoRA by both ways.
const CASES: usize = 18;

#[test]
fn values_and_gradients_are_within_one_percent_of_those_in_f32() -> Result<()> {
    for case in 0..CASES {
        let (want, got) = (layer(case, &Device::cpu())?, layer(case, &Device::emulating_bf16())?);
        for (i, (want, got)) in want.iter().zip(&got).enumerate() {
            let off = distance(got, want)?;
            // Each factor is off by at most 2⁻⁹, up to three products follow each other. And off they must
            // be, or bf16 was not used.
            assert!(1e-4 < off && off < 1e-2, "case {case}, tensor {i}: {off:.1e}");
        }
    }
    Ok(())
}

#[test]
fn the_same_bits_on_any_number_of_threads() {
    for case in [0, 1, 5, 6, 9, 14, 17] {
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let all = pool.install(|| layer(case, &Device::emulating_bf16()).unwrap());
            let bits =
                |x: Tensor| x.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>();
            all.into_iter().flat_map(bits).collect::<Vec<_>>()
        };
        let one = run(1);
        assert!(THREADS.into_iter().all(|threads| run(threads) == one), "case {case}");
    }
}

/// The same layer with another weight.
fn with_weight(layer: &Linear, weight: Tensor) -> Result<Linear> {
    let bias = layer.bias().map(|bias| Parameter::new(bias.value().clone()));
    Linear::new(Parameter::new(weight), bias)
}

/// The loss of two adapted layers before and after training them to imitate two others.
fn train(method: &dyn Method, stored: DType, device: &Device) -> Result<(f64, f64)> {
    let init = Init::seeded(7, device);
    let layers = |init: &Init| -> Result<Vec<Linear>> {
        Ok(vec![Linear::init(&init.at("0"), 130, 150, true)?, Linear::init(&init.at("1"), 150, 130, true)?])
    };
    let forward = |layers: &[Linear], x: &Tensor, ctx: &Context| -> Result<Tensor> {
        layers[1].forward(&Activation::Gelu.forward(&layers[0].forward(x, ctx)?)?, ctx)
    };
    let x = init.normal("x", [70, 130], 1.0)?;
    let mut model = layers(&init)?;
    for layer in &mut model {
        *layer = with_weight(layer, layer.weight().value().to_dtype(stored)?)?;
    }
    let goal = {
        let mut other = layers(&init)?;
        for layer in &mut other {
            let change = init.normal("change", [layer.outputs(), layer.inputs()], 0.05)?;
            let weight = layer.weight().value().add(&change)?;
            *layer = with_weight(layer, weight)?;
        }
        forward(&other, &x, &Context::eval())?
    };
    model.freeze();
    adapters::attach(&mut model, method, &Targets::AllLinear, &[])?;
    let mut optimizer = AdamW::new().weight_decay(0.0);
    let mut first = None;
    for step in 0..30 {
        let loss = forward(&model, &x, &Context::train(0, step))?.mse_loss(&goal)?;
        first.get_or_insert(loss.item()?);
        optimizer.step(&mut model, &loss.backward()?, 1e-2)?;
    }
    let last = forward(&model, &x, &Context::eval())?.mse_loss(&goal)?.item()?;
    Ok((first.unwrap_or(f64::NAN), last))
}

/// What is trained is too small at first to show in a weight rounded to bf16: it has to come through all
/// the same, also where the frozen weight is stored in bf16 and rounding takes the sum back to it.
#[test]
fn training_comes_as_far_as_in_f32() -> Result<()> {
    let methods: [(&dyn Method, &str); 2] = [
        (&RandLora { rank: 8, scale: 1.0, ..RandLora::default() }, "randlora"),
        (&Lora { rank: 8, ..Lora::default() }, "lora"),
    ];
    for (method, name) in methods {
        for stored in [DType::F32, DType::BF16] {
            let (first, want) = train(method, stored, &Device::cpu())?;
            let (_, got) = train(method, stored, &Device::emulating_bf16())?;
            assert!(want < 0.8 * first, "{name}, {stored}: {first} to {want} only");
            assert!(got != want, "{name}, {stored}: not in bf16");
            assert!((got - want).abs() < 0.05 * want, "{name}, {stored}: {got} where f32 comes to {want}");
        }
    }
    Ok(())
}
