//! RandLoRA's start: by default its first steps are as large as those of a LoRA of its size, whatever the bases.

use randlora::adapters::{self, Distribution, Lora, Method, RandLora, Start, Targets};
use randlora::nn::{Context, Init, Linear, Module};
use randlora::optim::{AdamW, Optimizer};
use randlora::{Device, Structure};

/// (in, out): square, wide, tall.
const SIZES: [(usize, usize); 3] = [(96, 96), (96, 250), (250, 96)];

const KINDS: [(Distribution, Structure); 5] = [
    (Distribution::Uniform, Structure::Dense),
    (Distribution::Normal, Structure::Dense),
    (Distribution::SIGNS, Structure::Dense),
    (Distribution::SPARSE, Structure::Dense),
    (Distribution::Uniform, Structure::Block),
];

/// ‖ΔW‖ after one step of AdamW.
fn first_step(method: &dyn Method, (inputs, outputs): (usize, usize)) -> f64 {
    let init = Init::seeded(3, &Device::cpu());
    let mut layer = Linear::init(&init, inputs, outputs, false).unwrap();
    adapters::attach(&mut layer, method, &Targets::AllLinear, &[]).unwrap();
    let (x, goal) =
        (init.normal("x", [200, inputs], 1.0).unwrap(), init.normal("goal", [200, outputs], 1.0).unwrap());
    let loss = layer.forward(&x, &Context::train(0, 0)).unwrap().mse_loss(&goal).unwrap();
    AdamW::new().weight_decay(0.0).step(&mut layer, &loss.backward().unwrap(), 1e-3).unwrap();
    let delta: Vec<f32> = layer.delta().unwrap().unwrap().to_vec().unwrap();
    delta.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

/// The same of a LoRA that trains as many numbers as RandLoRA of this rank: of rank 8, and what a step of
/// another rank would be.
fn of_lora(rank: usize, (inputs, outputs): (usize, usize)) -> f64 {
    let trained = RandLora { rank, ..RandLora::default() }.trained(inputs, outputs);
    let equal = trained as f64 / (inputs + outputs) as f64;
    first_step(&Lora { rank: 8, scale: 2.0, ..Lora::default() }, (inputs, outputs)) * (equal / 8.0).sqrt()
}

#[test]
fn first_steps_are_as_large_as_those_of_lora() {
    for sizes in SIZES {
        for (rank, scale) in [(6, RandLora::balanced_scale(6)), (16, 0.3)] {
            let wanted = of_lora(rank, sizes);
            for (distribution, structure) in KINDS {
                let method = RandLora { rank, scale, distribution, structure, ..RandLora::default() };
                let ratio = first_step(&method, sizes) / wanted;
                assert!(
                    (0.8..1.25).contains(&ratio),
                    "{sizes:?} {rank} {distribution:?} {structure:?}: {ratio}"
                );
            }
            let peft =
                RandLora { rank, scale: RandLora::PEFT_SCALE, start: Start::Peft, ..RandLora::default() };
            let ratio = first_step(&peft, sizes) / wanted;
            assert!(ratio > 2.0, "{sizes:?} {rank}: PEFT's start is {ratio}, and this test proves nothing");
        }
    }
}

#[test]
fn where_lambda_and_gamma_start() {
    let start = |method: RandLora, (inputs, outputs)| method.starts(inputs, outputs);
    let peft = RandLora { rank: 4, start: Start::Peft, ..RandLora::default() };
    assert_eq!(start(peft, (10, 30)), [0.0, 1.0 / 10.0]);
    assert_eq!(start(RandLora { rank: 1, ..peft }, (0, 0)), [0.0, 1.0]);
    // In a square layer a step is the same share of λ as of LoRA's A, but for r/m and alpha's rounding.
    for rank in [2, 8, 18, 32, 50] {
        let method = RandLora { rank, scale: RandLora::balanced_scale(rank), ..RandLora::default() };
        let share = start(method, (4096, 4096))[0] * (3.0f64 * 4096.0).sqrt();
        assert!((0.98..1.02).contains(&share), "{rank}: {share}");
    }
    for (rank, small, scale) in [(16, 384, 2.0 / 24f64.sqrt()), (5, 12, 2.0 / 3f64.sqrt())] {
        assert_eq!(RandLora::paper_scale(rank, small), scale);
    }
    // Every adapter has its layer's own.
    for (inputs, outputs) in SIZES {
        let method = RandLora { rank: 6, ..RandLora::default() };
        let mut layer = Linear::init(&Init::seeded(3, &Device::cpu()), inputs, outputs, false).unwrap();
        adapters::attach(&mut layer, &method, &Targets::AllLinear, &[]).unwrap();
        for (part, wanted) in ["lambda", "gamma"].into_iter().zip(start(method, (inputs, outputs))) {
            let (_, value) = layer.parameters().into_iter().find(|(name, _)| name.ends_with(part)).unwrap();
            assert!(value.value().to_vec::<f32>().unwrap().iter().all(|&x| x == wanted as f32), "{part}");
        }
    }
}

#[test]
fn scales_without_a_start_are_refused() {
    let attach = |scale, start| {
        let mut layer = Linear::init(&Init::seeded(3, &Device::cpu()), 8, 8, false).unwrap();
        let method = RandLora { rank: 2, scale, start, ..RandLora::default() };
        adapters::attach(&mut layer, &method, &Targets::AllLinear, &[]).map(|_| ())
    };
    for (scale, start) in [(0.0, Start::LikeLora), (f64::NAN, Start::Peft), (f64::INFINITY, Start::LikeLora)]
    {
        let error = attach(scale, start).unwrap_err().to_string();
        assert!(error.starts_with("scale: "), "{error}");
    }
    assert!(attach(0.0, Start::Peft).is_ok() && attach(-1.0, Start::LikeLora).is_ok());
}
