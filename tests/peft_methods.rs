//! The methods of PEFT beside RandLoRA: logits and gradients on the same weights (made by
//! tests/oracle/peft_methods.py), and AdaLoRA's training with its budget.

#[allow(dead_code)] // Each test file uses a part of them.
mod common;

use std::path::PathBuf;

use common::{batch, close, expected, load, oracle, tensors, values};
use randlora::adapters::{
    AdaLora, Dora, LayerInfo, Lora, Method, PerLayer, Pissa, Targets, Vera, VeraAdapter, attach,
};
use randlora::io::{Access, SafeTensors};
use randlora::models::Bert;
use randlora::nn::{Context, ItemMut, LinearAdapter, Module};
use randlora::optim::{AdamW, Optimizer};
use randlora::{DType, Device, Result, Tensor};

/// Square, wide and tall.
const LAYERS: [&str; 3] =
    ["layer.0.attention.self.query", "layer.1.intermediate.dense", "layer.1.output.dense"];

/// How far logits and gradients may be from PEFT's in f64, relative to the largest. PiSSA's start is computed
/// in f32 there.
fn tolerances(case: &str, dtype: DType) -> (f64, f64) {
    match (case, dtype) {
        (_, DType::F32) => (1e-5, 1e-4),
        ("pissa", _) => (1e-5, 1e-4),
        _ => (1e-12, 1e-11),
    }
}

fn folder(case: &str) -> PathBuf {
    oracle("peft_methods").join(case)
}

fn inputs() -> SafeTensors {
    tensors(&oracle("peft_adapters/inputs.safetensors"))
}

/// VeRA with the matrices of a file.
#[derive(Debug)]
struct StoredVera(Vera, SafeTensors);

impl Method for StoredVera {
    fn name(&self) -> &'static str {
        "vera"
    }

    fn adapters(&self, layers: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        let one = |layer: &LayerInfo| {
            let read = |name| self.1.tensor(name, &layer.device)?.to_dtype(layer.dtype);
            let (a, b) = (read("base_model.vera_A")?, read("base_model.vera_B")?);
            Ok(Box::new(VeraAdapter::new(&self.0, layer, &a, &b)?) as Box<dyn LinearAdapter>)
        };
        layers.iter().map(one).collect::<Result<_>>().map(Some)
    }
}

/// The settings of tests/oracle/peft_methods.py.
fn method(case: &str) -> Box<dyn Method> {
    let lora = |rank: usize, alpha: f64| Lora { rank, scale: alpha / rank as f64, ..Lora::default() };
    let ada = AdaLora { rank: 2, first_rank: 5, scale: 3.0 / (5.0 + 1e-5), interval: 1, ..AdaLora::over(14) };
    match case {
        "rslora" => Box::new(Lora::stabilised(5, 7.0)),
        "patterns" => Box::new(
            PerLayer::new(Box::new(lora(5, 7.0)))
                .with(Targets::names(&["layer.1.output.dense"]), Box::new(lora(3, 7.0)))
                .with(Targets::names(&["query"]), Box::new(lora(5, 2.0))),
        ),
        "dora" => Box::new(Dora { rank: 5, scale: 7.0 / 5.0, ..Dora::default() }),
        "pissa" => Box::new(Pissa { rank: 5, scale: 7.0 / 5.0, dropout: 0.0 }),
        "vera" => {
            let file = tensors(&folder(case).join("adapter_model.safetensors"));
            Box::new(StoredVera(Vera { rank: 7, ..Vera::default() }, file))
        }
        "adalora" => Box::new(AdaLora { warmup: 0, fixed: 0, ..ada }),
        _ => Box::new(AdaLora { warmup: 2, fixed: 4, interval: 2, ..ada }),
    }
}

/// PEFT's name of an adapter's parameter.
fn stored(case: &str, name: &str) -> String {
    let (layer, part) = name.rsplit_once('.').unwrap();
    let (layer, _) = layer.rsplit_once('.').unwrap();
    let part = match (case, part) {
        ("vera", part) => format!("vera_{part}"),
        ("adalora" | "adalora-training", part) => format!("lora_{}", part.to_uppercase()),
        (_, "magnitude") => "lora_magnitude_vector".into(),
        (_, part) => format!("lora_{}.weight", part.to_uppercase()),
    };
    format!("base_model.model.{layer}.{part}")
}

/// The model with the adapter's stored numbers.
fn adapted(case: &str, dtype: DType) -> Bert {
    let mut model = load(&oracle("peft_adapters/model"), Access::Map);
    model.cast(dtype).unwrap();
    attach(&mut model, &*method(case), &Targets::names(&LAYERS), &[]).unwrap();
    let file = tensors(&folder(case).join("adapter_model.safetensors"));
    model
        .try_visit_mut(&mut |name, item| match item {
            ItemMut::Parameter(parameter) if parameter.is_trainable() => {
                let value = file.tensor(&stored(case, name), &Device::cpu())?;
                parameter.set(value.to_dtype(dtype)?)
            }
            _ => Ok(()),
        })
        .unwrap();
    model
}

#[test]
fn logits_and_gradients_are_pefts() {
    for case in ["rslora", "patterns", "dora", "pissa", "vera", "adalora"] {
        let want = tensors(&folder(case).join("expected.safetensors"));
        for dtype in [DType::F64, DType::F32] {
            let (for_logits, for_gradients) = tolerances(case, dtype);
            let model = adapted(case, dtype);
            let logits = model.forward(&batch(&inputs(), None), &Context::eval().tracked()).unwrap();
            close(
                &format!("{case} {dtype}"),
                &values(&logits.detach()),
                &expected(&want, "logits"),
                for_logits,
            );
            let weights = (0..logits.numel()).map(|i| (i as f64).cos()).collect();
            let weights = Tensor::from_vec::<f64>(weights, logits.shape(), &Device::cpu()).unwrap();
            let gradients = logits.backward_from(&weights.to_dtype(dtype).unwrap()).unwrap();
            let mut checked = 0;
            for (name, parameter) in model.parameters() {
                if parameter.is_trainable() {
                    let got = values(gradients.get(parameter.leaf()).unwrap());
                    let want = expected(&want, &format!("grad.{}", stored(case, &name)));
                    close(&format!("{case} {dtype} {name}"), &got, &want, for_gradients);
                    checked += 1;
                }
            }
            assert_eq!(checked + 1, want.entries().count(), "{case}");
        }
    }
}

/// What PiSSA started from is what PEFT took out of the weight: both are the principal part of it.
#[test]
fn pissa_starts_where_pefts_does() {
    let mut model = load(&oracle("peft_adapters/model"), Access::Map);
    model.cast(DType::F64).unwrap();
    let plain = model.forward(&batch(&inputs(), None), &Context::eval()).unwrap();
    close("no adapter", &values(&plain), &expected(&inputs(), "logits"), 1e-12);
    attach(&mut model, &*method("pissa"), &Targets::names(&LAYERS), &[]).unwrap();
    let started = model.forward(&batch(&inputs(), None), &Context::eval()).unwrap();
    close("PiSSA at its start", &values(&started), &values(&plain), 1e-14);
}

#[test]
fn adalora_takes_away_what_peft_takes_away() {
    let case = "adalora-training";
    let want = tensors(&folder(case).join("expected.safetensors"));
    let mut model = adapted(case, DType::F64);
    let mut optimizer = AdamW::new().weight_decay(0.0);
    let (tokens, ctx) = (batch(&inputs(), None), Context::eval().tracked());
    let mut losses = vec![];
    for step in 0..14 {
        let loss = model.forward(&tokens, &ctx).unwrap().cross_entropy(&[0, 2, 1, 1, 0], None, 0.0).unwrap();
        let loss = loss.add(&model.regulariser(&ctx).unwrap().unwrap()).unwrap();
        losses.push(loss.item().unwrap());
        let gradients = loss.backward().unwrap();
        optimizer.step(&mut model, &gradients, 0.02).unwrap();
        model.after_step(step, &gradients).unwrap();
    }
    close("losses", &losses, &expected(&want, "losses"), 1e-10);
    let mut ranks = vec![];
    for (name, parameter) in model.parameters() {
        if name.ends_with("adalora.e") {
            let got = values(parameter.value());
            close(&name, &got, &expected(&want, &stored(case, &name)), 1e-9);
            ranks.push(got.iter().filter(|&&e| e != 0.0).count());
        }
    }
    // Two for each layer, but not in each: what is left is where it matters.
    assert_eq!(ranks, [4, 1, 1]);
}
