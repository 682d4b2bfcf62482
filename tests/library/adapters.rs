//! Every method as a whole adapted layer, square, wide and tall: its gradients, its start, its update, its
//! merging, its precision, its dropout, and what it refuses.

use std::sync::Arc;

use randlora::adapters::{
    self, AdaLora, Atlas, BitFit, Dora, Full, HydraLora, Intrinsic, LayerInfo, Lora, LoraXs, Method, Nola,
    PerLayer, Pissa, Pranc, RandLora, Settings, Svft, Targets, TaskVector, Vera, task_vector,
};
use randlora::data::Batches;
use randlora::gradcheck::{
    self,
    mistakes::{self, Mistake},
};
use randlora::nn::{Context, Init, Linear, LinearAdapter, Module, Parameter};
use randlora::optim::AdamW;
use randlora::train::{Flow, Trainer};
use randlora::{DType, Device, Error, Result, Tensor};

/// (in, out): square, wide, tall, and one number on a side.
const SIZES: [(usize, usize); 4] = [(7, 7), (6, 11), (11, 6), (5, 1)];

fn normal(name: &str, dims: &[usize], dtype: DType) -> Tensor {
    Init::seeded(1, &Device::cpu()).normal(name, dims, 1.0).unwrap().to_dtype(dtype).unwrap()
}

/// Every method with adapters, at settings that fit all sizes; those with dropout have this rate.
fn methods((inputs, outputs): (usize, usize), dropout: f64) -> Vec<Box<dyn Method>> {
    let rank = 4.min(inputs).min(outputs);
    let tau = |name| TaskVector::from([(String::new(), normal(name, &[outputs, inputs], DType::F32))]);
    vec![
        Box::new(RandLora { rank: 3, scale: 0.7, dropout, ..RandLora::default() }),
        Box::new(Lora { rank: 4, scale: 0.7, dropout, seed: 5 }),
        Box::new(Dora { rank: 4, scale: 0.7, dropout, seed: 5, through_norm: true }),
        Box::new(Vera { rank: 9, dropout, ..Vera::default() }),
        Box::new(Pissa { rank, scale: 0.7, dropout }),
        Box::new(LoraXs { rank, scale: 0.7, dropout, seed: 5 }),
        Box::new(Svft { band: 2.min(rank - 1) }),
        Box::new(AdaLora { rank: 3, first_rank: 5, dropout, ..AdaLora::over(100) }),
        Box::new(HydraLora { rank: 4, heads: 3, scale: 0.7, dropout, seed: 5 }),
        Box::new(Nola { rank: 3, coefficients: 6, scale: 0.7, dropout, seed: 5 }),
        Box::new(Pranc { coefficients: 6, scale: 0.7, dropout, seed: 5 }),
        Box::new(Intrinsic { coefficients: 5, seed: 5 }),
        Box::new(Atlas { vectors: vec![tau("τ1"), tau("τ2")] }),
    ]
}

fn attached(method: &dyn Method, (inputs, outputs): (usize, usize), dtype: DType) -> Linear {
    let mut layer = Linear::init(&Init::seeded(2, &Device::cpu()), inputs, outputs, true).unwrap();
    layer.cast(dtype).unwrap();
    adapters::attach(&mut layer, method, &Targets::AllLinear, &[]).unwrap();
    layer
}

/// Moves the adapter's numbers away from where they start.
fn stir(layer: &mut Linear) {
    for (name, parameter) in layer.adapter_mut().unwrap().parameters_mut() {
        let (value, dims) = (parameter.value(), parameter.value().dims());
        let noise = normal(name, dims, DType::F32).scale(0.4).unwrap().to_dtype(value.dtype()).unwrap();
        let stirred = value.add(&noise).unwrap();
        parameter.set(stirred).unwrap();
    }
}

fn wide(x: &Tensor) -> Vec<f64> {
    x.detach().to_dtype(DType::F64).unwrap().to_vec().unwrap()
}

/// max|a − b| in units of the largest of b, or of 1.
fn far(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (wide(a), wide(b));
    assert!(a.iter().chain(&b).all(|x| x.is_finite()), "not a number among them");
    let largest = b.iter().fold(1.0f64, |m, x| m.max(x.abs()));
    a.iter().zip(&b).fold(0.0f64, |m, (a, b)| m.max((a - b).abs())) / largest
}

/// Calls `f` for every method and size.
fn each(dropout: f64, dtype: DType, f: impl Fn(&str, Linear, (usize, usize))) {
    for sizes in SIZES {
        for method in methods(sizes, dropout) {
            f(&format!("{} {sizes:?}", method.name()), attached(&*method, sizes, dtype), sizes);
        }
    }
}

#[test]
fn every_method_passes_gradcheck_as_a_layer() {
    each(0.0, DType::F64, |what, mut layer, (inputs, outputs)| {
        stir(&mut layer);
        let x = normal("x", &[2, 3, inputs], DType::F64);
        let check = gradcheck::model(&mut layer, |layer, ctx| {
            let y = layer.forward(&x, ctx)?.tanh()?;
            match layer.regulariser(ctx)? {
                Some(term) => y.add(&term),
                None => Ok(y),
            }
        });
        check.unwrap_or_else(|error| panic!("{what}: {error}"));
        let of_x = |x: &[Tensor]| layer.forward(&x[0], &Context::eval().tracked())?.tanh();
        gradcheck::function(what, of_x).check(&[x]).unwrap_or_else(|error| panic!("{what}, x: {error}"));
        assert_eq!(
            layer.forward(&normal("x", &[0, inputs], DType::F64), &Context::eval()).unwrap().dims(),
            [0, outputs]
        );
    });
}

/// Whose layer LoRA has one operation for is the frozen weight; with a trained one it is a sum, with or without dropout.
#[test]
fn lora_beside_a_trained_weight_and_bias() {
    for (sizes, dropout) in SIZES.into_iter().flat_map(|sizes| [(sizes, 0.0), (sizes, 0.4)]) {
        let method = Lora { rank: 3, scale: 0.7, dropout, seed: 5 };
        let mut layer = attached(&method, sizes, DType::F64);
        stir(&mut layer);
        let (x, train) = (normal("x", &[2, 3, sizes.0], DType::F64), Context::train(3, 4));
        let frozen = layer.forward(&x, &train).unwrap();
        layer.set_trainable(true);
        assert_eq!(
            layer.trainable_count(),
            layer.parameters().iter().map(|(_, p)| p.value().numel()).sum::<usize>()
        );
        assert!(far(&layer.forward(&x, &train).unwrap(), &frozen) < 1e-14);
        gradcheck::model(&mut layer, |layer, _| layer.forward(&x, &train)?.tanh())
            .unwrap_or_else(|error| panic!("{sizes:?}, dropout {dropout}: {error}"));
    }
}

/// With dropout the mask belongs to the context: it is the same in every evaluation.
#[test]
fn gradients_are_right_under_dropout() {
    each(0.4, DType::F64, |what, mut layer, (inputs, _)| {
        stir(&mut layer);
        let x = normal("x", &[6, inputs], DType::F64);
        let train = Context::train(3, 4).enter(5);
        gradcheck::model(&mut layer, |layer, _| layer.forward(&x, &train)?.tanh())
            .unwrap_or_else(|error| panic!("{what}: {error}"));
    });
}

#[test]
fn nothing_changes_at_the_start() {
    each(0.0, DType::F64, |what, mut layer, (inputs, _)| {
        let x = normal("x", &[5, inputs], DType::F64);
        let adapted = layer.forward(&x, &Context::eval()).unwrap();
        let delta = layer.delta();
        let adapter = layer.detach().unwrap();
        // LoRA-XS starts with a normal R of standard deviation 1e-5.
        let tolerance = if adapter.method() == "lora-xs" { 1e-3 } else { 1e-15 };
        assert!(far(&adapted, &layer.forward(&x, &Context::eval()).unwrap()) <= tolerance, "{what}");
        match adapter.method() {
            "hydralora" => assert!(matches!(delta, Err(Error::Config { what: "merge", .. }))),
            _ => assert!(wide(&delta.unwrap().unwrap()).iter().all(|d| d.abs() <= tolerance), "{what}"),
        }
    });
}

#[test]
fn the_update_is_what_the_layer_adds_and_merging_keeps_it() {
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
        each(0.0, dtype, |what, mut layer, (inputs, _)| {
            stir(&mut layer);
            let x = normal("x", &[9, inputs], dtype);
            let adapted = layer.forward(&x, &Context::eval()).unwrap();
            if layer.adapter().unwrap().method() == "hydralora" {
                assert!(layer.merge(None).is_err());
                assert_eq!(wide(&layer.forward(&x, &Context::eval()).unwrap()), wide(&adapted), "{what}");
                return;
            }
            let delta = layer.delta().unwrap().unwrap();
            assert!(wide(&delta).iter().any(|d| d.abs() > 1e-3), "{what} changes nothing");
            let weight = layer.weight().value().add(&delta).unwrap();
            let by_hand = x.linear(&weight, layer.bias().map(|b| b.value())).unwrap();
            assert!(far(&adapted, &by_hand) < tolerance, "{what} {dtype}");
            layer.merge(None).unwrap();
            assert!(layer.adapter().is_none());
            assert!(
                far(&layer.forward(&x, &Context::eval()).unwrap(), &adapted) < tolerance,
                "{what} {dtype}"
            );
        });
    }
}

#[test]
fn f32_is_f64_rounded() {
    for sizes @ (inputs, _) in SIZES {
        for method in methods(sizes, 0.0) {
            let run = |dtype: DType| {
                // Both from the same f32 weight, with the adapter's numbers of the f32 layer.
                let (mut layer, mut narrow) =
                    (attached(&*method, sizes, dtype), attached(&*method, sizes, DType::F32));
                stir(&mut narrow);
                let pairs = layer.adapter_mut().unwrap().parameters_mut().into_iter();
                for ((_, to), (_, from)) in pairs.zip(narrow.adapter().unwrap().parameters()) {
                    to.set(from.value().to_dtype(dtype).unwrap()).unwrap();
                }
                let y = layer.forward(&normal("x", &[9, inputs], dtype), &Context::eval().tracked()).unwrap();
                let gradients = y.backward_from(&normal("dy", y.dims(), dtype)).unwrap();
                let mut all = vec![y.detach()];
                for (_, parameter) in layer.adapter().unwrap().parameters() {
                    all.push(gradients.get(parameter.leaf()).unwrap().clone());
                }
                all
            };
            for (narrow, wide) in run(DType::F32).iter().zip(run(DType::F64)) {
                let far = far(narrow, &wide);
                assert!(far < 1e-5, "{} {sizes:?}: {far:e}", method.name());
            }
        }
    }
}

#[test]
fn weights_may_be_stored_narrow() {
    for sizes @ (inputs, outputs) in SIZES {
        let (x, bias) = (normal("x", &[4, inputs], DType::F32), normal("b", &[outputs], DType::F32));
        for dtype in [DType::BF16, DType::F16] {
            let stored = normal("w", &[outputs, inputs], dtype);
            for method in methods(sizes, 0.0) {
                let run = |weight: Tensor| {
                    let bias = Parameter::frozen(bias.clone());
                    let mut layer = Linear::new(Parameter::frozen(weight), Some(bias)).unwrap();
                    adapters::attach(&mut layer, &*method, &Targets::AllLinear, &[]).unwrap();
                    stir(&mut layer);
                    layer.forward(&x, &Context::eval()).unwrap()
                };
                let widened = run(stored.to_dtype(DType::F32).unwrap());
                assert!(far(&run(stored.clone()), &widened) < 1e-6, "{} {dtype}", method.name());
            }
        }
    }
}

/// y = W0·x + b + ΔW·drop(x), where ΔW is the update without dropout.
#[test]
fn dropout_is_of_the_adapters_input() {
    each(0.5, DType::F64, |what, mut layer, (inputs, _)| {
        stir(&mut layer);
        let (x, ctx) = (normal("x", &[8, inputs], DType::F64), Context::train(1, 2).enter(3));
        let trained = layer.forward(&x, &ctx).unwrap();
        let evaluated = layer.forward(&x, &Context::eval()).unwrap();
        let method = layer.adapter().unwrap().method();
        let drops = !["svft", "intrinsic", "atlas"].contains(&method);
        assert_eq!(far(&trained, &evaluated) > 1e-3, drops, "{what}");
        if !drops || ["hydralora", "pissa"].contains(&method) {
            return;
        }
        let delta = layer.delta().unwrap().unwrap();
        layer.detach();
        let update = ctx.dropout(&x, 0.5).unwrap().linear(&delta, None).unwrap();
        let want = layer.forward(&x, &Context::eval()).unwrap().add(&update).unwrap();
        assert!(far(&trained, &want) < 1e-12, "{what}");
    });
}

/// What PiSSA started from is part of the frozen weight, whose input is whole.
#[test]
fn pissa_drops_the_input_of_what_it_trains_alone() {
    let mut layer = attached(&Pissa { rank: 3, scale: 0.7, dropout: 0.5 }, (6, 11), DType::F64);
    let start = layer.adapter().unwrap().parameters().into_iter().map(|(_, p)| p.value().clone());
    let [a, b] = [0, 1].map({
        let all: Vec<Tensor> = start.collect();
        move |i| all[i].clone()
    });
    let principal = b.matmul(&a).unwrap().scale(0.7).unwrap();
    stir(&mut layer);
    let delta = layer.delta().unwrap().unwrap();
    let (x, ctx) = (normal("x", &[8, 6], DType::F64), Context::train(1, 2));
    let residual = layer.weight().value().sub(&principal).unwrap();
    let trained = ctx.dropout(&x, 0.5).unwrap().linear(&delta.add(&principal).unwrap(), None).unwrap();
    let want = x.linear(&residual, layer.bias().map(|b| b.value())).unwrap().add(&trained).unwrap();
    assert!(far(&layer.forward(&x, &ctx).unwrap(), &want) < 1e-12);
}

/// DoRA's usual gradient takes the lengths of the rows for constant: it is that of the layer whose gain
/// depends on m alone.
#[test]
fn doras_lengths_are_constant_in_the_gradient() {
    for sizes @ (inputs, _) in SIZES {
        let method = Dora { rank: 3, scale: 0.7, dropout: 0.0, seed: 5, through_norm: false };
        let mut layer = attached(&method, sizes, DType::F64);
        stir(&mut layer);
        let x = normal("x", &[9, inputs], DType::F64);
        let parts: Vec<Tensor> =
            layer.adapter().unwrap().parameters().into_iter().map(|(_, p)| p.value().clone()).collect();
        let (weight, bias) = (layer.weight().value().clone(), layer.bias().unwrap().value().clone());
        let whole = |a: &Tensor, b: &Tensor| weight.add(&b.matmul(a)?.scale(0.7)?);
        let lengths =
            whole(&parts[0], &parts[1]).unwrap().powf(2.0).unwrap().sum(&[1], false).unwrap().sqrt().unwrap();
        let frozen = |p: &[Tensor]| -> Result<Tensor> {
            x.linear(&whole(&p[0], &p[1])?.mul(&p[2].div(&lengths)?.unsqueeze(1)?)?, Some(&bias))?.tanh()
        };
        gradcheck::function("constant lengths", frozen).check(&parts).unwrap();
        let tracked: Vec<Tensor> = parts.iter().map(Tensor::track).collect();
        let want = frozen(&tracked).unwrap().sum_all().unwrap().backward().unwrap();
        let y = layer.forward(&x, &Context::eval().tracked()).unwrap().tanh().unwrap();
        let got = y.sum_all().unwrap().backward().unwrap();
        for ((name, parameter), tracked) in layer.adapter().unwrap().parameters().into_iter().zip(&tracked) {
            assert!(far(got.get(parameter.leaf()).unwrap(), want.of(tracked).unwrap()) < 1e-12, "{name}");
        }
        // And it is not the gradient of the layer as it is.
        let error = gradcheck::model(&mut layer, |layer, ctx| layer.forward(&x, ctx)?.tanh());
        assert!(matches!(error, Err(Error::Gradcheck { .. })));
    }
}

#[test]
fn rows_of_dora_have_the_lengths_that_it_trains() {
    for sizes in SIZES {
        let mut layer = attached(&Dora { rank: 2, ..Dora::default() }, sizes, DType::F64);
        stir(&mut layer);
        let magnitudes = layer.adapter().unwrap().parameters()[2].1.value().clone();
        layer.merge(None).unwrap();
        let lengths = layer.weight().value().powf(2.0).unwrap().sum(&[1], false).unwrap().sqrt().unwrap();
        assert!(far(&lengths, &magnitudes.abs().unwrap()) < 1e-12);
    }
}

/// Two layers of different sizes, so that what layers share is cut for both.
struct Net {
    first: Linear,
    second: Linear,
}
randlora::module!(Net { first, second });

fn net() -> Net {
    let init = Init::seeded(3, &Device::cpu());
    Net {
        first: Linear::init(&init.at("first"), 6, 10, true).unwrap(),
        second: Linear::init(&init.at("second"), 10, 4, true).unwrap(),
    }
}

/// Ten epochs of four steps towards what another net says; the losses.
fn train(net: &mut Net, learning_rate: f64) -> Vec<f64> {
    let (x, goal) = (normal("inputs", &[32, 6], DType::F32), normal("goal", &[32, 4], DType::F32));
    let rows = |x: &Tensor, rows: &[usize]| {
        let picked: Vec<Tensor> = rows.iter().map(|&row| x.slice(0, row..row + 1)).collect::<Result<_>>()?;
        Tensor::concat(&picked.iter().collect::<Vec<_>>(), 0)
    };
    let loss = |net: &Net, picked: &[usize], ctx: &Context| {
        let hidden = net.first.forward(&rows(&x, picked)?, &ctx.enter(0))?.gelu()?;
        net.second.forward(&hidden, &ctx.enter(1))?.mse_loss(&rows(&goal, picked)?)
    };
    let mut losses = vec![];
    let mut trainer = Trainer::new(AdamW::new(), learning_rate, 10);
    let on_step = |_: &Net, progress: &randlora::train::Progress| {
        losses.push(progress.loss);
        Ok(Flow::Continue)
    };
    trainer.fit(net, &Batches::new(32, 8, 0).unwrap(), loss, on_step).unwrap();
    losses
}

#[test]
fn every_method_by_its_name_trains_and_counts_what_it_says() {
    let settings = Settings { steps: Some(40), ..Settings::default() };
    for name in adapters::METHODS {
        let small = match name {
            "lora-xs" | "pissa" => Settings { rank: Some(4), ..settings },
            "intrinsic" => Settings { coefficients: Some(20), ..settings },
            _ => settings,
        };
        let mut model = net();
        let method = adapters::by_name(name, &small).unwrap();
        let attached = adapters::attach(&mut model, &*method, &Targets::AllLinear, &[]).unwrap();
        // (in, out) of the layers: (6, 10) and (10, 4).
        let want = match name {
            "randlora" => (32 + 6) + (32 + 4),
            "lora" | "rslora" => 8 * (16 + 14),
            "dora" => 8 * (16 + 14) + 14,
            "vera" => 256 + 10 + 256 + 4,
            "bitfit" => 14,
            "pissa" => 4 * (16 + 14),
            "lora-xs" => 2 * 16,
            "nola" => 4 * 64,
            "svft" => 6 + 4,
            "adalora" => 12 * (17 + 15),
            "hydralora" => 8 * (6 + 3 * 10) + 3 * 6 + 8 * (10 + 3 * 4) + 3 * 10,
            "pranc" => 2 * 64,
            "intrinsic" => 2 * 20,
            _ => 6 * 10 + 10 + 10 * 4 + 4,
        };
        assert_eq!(attached.trained, want, "{name}");
        let losses = train(&mut model, 1e-2);
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        // AdaLoRA's loss has the distance from orthonormal vectors in it, which is what falls first.
        assert!(mean(&losses[36..]) < mean(&losses[..4]), "{name}: {losses:?}");
    }
}

#[test]
fn adalora_keeps_the_budget_over_all_layers() {
    let method = AdaLora { rank: 2, first_rank: 6, warmup: 4, fixed: 10, interval: 1, ..AdaLora::over(40) };
    let mut model = net();
    adapters::attach(&mut model, &method, &Targets::AllLinear, &[]).unwrap();
    train(&mut model, 1e-2);
    let ranks: Vec<usize> = model
        .linears()
        .into_iter()
        .map(|(_, layer)| {
            let any: &dyn std::any::Any = layer.adapter().unwrap();
            any.downcast_ref::<adapters::AdaLoraAdapter>().unwrap().rank().unwrap()
        })
        .collect();
    assert_eq!(ranks.iter().sum::<usize>(), 2 * 2, "{ranks:?}");
}

#[test]
fn settings_out_of_range() {
    let layer = |inputs: usize, outputs: usize| {
        let layer = Linear::init(&Init::seeded(2, &Device::cpu()), inputs, outputs, true).unwrap();
        let weight = layer.weight().value().clone();
        LayerInfo { name: "layer".into(), inputs, outputs, dtype: DType::F32, device: Device::cpu(), weight }
    };
    let fails = |method: &dyn Method, part: &str| {
        let error = method.adapters(&[layer(4, 6)]).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Config { .. }) && text.contains(part), "{text}: no `{part}`");
    };
    let (nan, lora, pissa, xs) = (f64::NAN, Lora::default(), Pissa::default(), LoraXs::default());
    fails(&Lora { rank: 0, ..lora }, "at least 1");
    fails(&Lora { scale: nan, ..lora }, "finite");
    fails(&Lora { dropout: 1.0, ..lora }, "0 ≤ p < 1");
    fails(&Dora { rank: 0, ..Dora::default() }, "at least 1");
    fails(&Vera { rank: 0, ..Vera::default() }, "at least 1");
    fails(&Vera { d_initial: nan, ..Vera::default() }, "finite");
    fails(&Pissa { rank: 5, ..pissa }, "5 is more than the 4 singular values of `layer`");
    fails(&Pissa { scale: 0.0, ..pissa }, "above 0");
    fails(&LoraXs { rank: 5, ..xs }, "singular values");
    fails(&Svft { band: 4 }, "4×4 of `layer`");
    fails(&HydraLora { heads: 0, ..HydraLora::default() }, "at least 1");
    fails(&Nola { coefficients: 0, ..Nola::default() }, "at least 1");
    fails(&Pranc { coefficients: 0, ..Pranc::default() }, "at least 1");
    fails(&Intrinsic { coefficients: 25, seed: 0 }, "25 numbers for a weight of 24");
    fails(&Atlas::default(), "at least one");
    let ada = AdaLora::over(100);
    fails(&AdaLora { first_rank: 7, ..ada }, "does not shrink to 8");
    fails(&AdaLora { warmup: 60, ..ada }, "leave none of 100");
    fails(&AdaLora { interval: 0, ..ada }, "1 is the least");
    fails(&AdaLora { beta2: 1.0, ..ada }, "0 ≤ β < 1");
    fails(&AdaLora { orthogonality: -1.0, ..ada }, "no weight");

    let mut zero = layer(4, 6);
    zero.weight = Tensor::zeros([6, 4], DType::F32, &Device::cpu()).unwrap();
    let error = Dora::default().adapters(&[zero]).unwrap_err();
    assert!(error.to_string().contains("row 0 of `layer` is 0"), "{error}");
    let other = Atlas { vectors: vec![TaskVector::from([("x".into(), normal("x", &[6, 4], DType::F32))])] };
    assert!(matches!(other.adapters(&[layer(4, 6)]), Err(Error::NoMatch { .. })));
    let size =
        Atlas { vectors: vec![TaskVector::from([("layer".into(), normal("x", &[4, 6], DType::F32))])] };
    assert!(matches!(size.adapters(&[layer(4, 6)]), Err(Error::Shape { .. })));
    assert!(matches!(
        task_vector(&vec![net().first, net().second], &vec![net().first], &Targets::AllLinear),
        Err(Error::NoMatch { .. })
    ));
}

#[test]
fn a_task_vector_is_what_training_has_changed_in_the_layers_that_are_meant() {
    let (base, mut tuned) = (vec![net().first, net().second], vec![net().first, net().second]);
    let noise = normal("noise", &[10, 6], DType::F32);
    tuned
        .try_visit_mut(&mut |name, item| match item {
            randlora::nn::ItemMut::Parameter(p) if name == "0.weight" => p.set(p.value().add(&noise)?),
            _ => Ok(()),
        })
        .unwrap();
    let of = |tuned: &Vec<Linear>, targets: &Targets| task_vector(&base, tuned, targets).unwrap();
    let vector = of(&tuned, &Targets::names(&["0"]));
    assert_eq!(vector.keys().collect::<Vec<_>>(), ["0"]);
    assert!(far(&vector["0"], &noise) < 1e-6);
    // Of a model with an adapter, the adapter's change of the base; nothing in a layer without one.
    let mut adapted = vec![net().first, net().second];
    adapters::attach(&mut adapted, &Lora::default(), &Targets::names(&["1"]), &[]).unwrap();
    stir(&mut adapted[1]);
    let vector = of(&adapted, &Targets::AllLinear);
    assert_eq!(wide(&vector["1"]), wide(&adapted[1].delta().unwrap().unwrap()));
    assert!(wide(&vector["0"]).iter().all(|&x| x == 0.0));
    // And of an adapted base, the base as it is with its adapter.
    let back = task_vector(&adapted, &base, &Targets::AllLinear).unwrap();
    assert!(
        far(&back["1"].scale(-1.0).unwrap(), &vector["1"]) == 0.0
            && wide(&back["1"]).iter().any(|&x| x != 0.0)
    );
    assert!(
        wide(&task_vector(&adapted, &adapted, &Targets::AllLinear).unwrap()["1"]).iter().all(|&x| x == 0.0)
    );
    assert!(task_vector(&base, &tuned, &Targets::names(&["9"])).unwrap().is_empty());
}

#[test]
fn a_task_vector_has_the_wider_type_but_no_less_than_f32() {
    let nets = |dtype| {
        let mut nets = [net().first, net().second].map(|layer| vec![layer]);
        nets.iter_mut().for_each(|net| {
            net.freeze();
            net.cast(dtype).unwrap();
        });
        nets
    };
    for (from, to, want) in [
        (DType::BF16, DType::BF16, DType::F32),
        (DType::F32, DType::BF16, DType::F32),
        (DType::F64, DType::F32, DType::F64),
        (DType::BF16, DType::F64, DType::F64),
    ] {
        let ([base, _], [mut tuned, _]) = (nets(from), nets(to));
        adapters::attach(&mut tuned, &Lora::default(), &Targets::AllLinear, &[]).unwrap();
        stir(&mut tuned[0]);
        let vector = task_vector(&base, &tuned, &Targets::AllLinear).unwrap();
        assert_eq!(vector["0"].dtype(), want, "{from} {to}");
        // What 16 bits round away is a part of the difference.
        let weight = |net: &Vec<Linear>| wide(net[0].weight().value());
        let delta = wide(&tuned[0].delta().unwrap().unwrap());
        let found = wide(&vector["0"]);
        for (i, (to, from)) in weight(&tuned).iter().zip(weight(&base)).enumerate() {
            assert!((found[i] - (to - from + delta[i])).abs() < 1e-6, "{from} {to}");
        }
    }
}

#[test]
fn names_and_what_they_do_not_have() {
    let settings = Settings::default();
    let error = |name: &str, settings: Settings| adapters::by_name(name, &settings).unwrap_err().to_string();
    assert!(error("qlora", settings).contains("randlora, lora, rslora, dora"));
    assert!(error("adalora", settings).contains("steps"));
    assert!(error("svft", Settings { rank: Some(2), ..settings }).contains("svft has none"));
    assert!(error("vera", Settings { scale: Some(2.0), ..settings }).contains("vera has none"));
    assert!(error("full", Settings { dropout: 0.1, ..settings }).contains("full has none"));
    assert!(error("lora", Settings { coefficients: Some(3), ..settings }).contains("lora has none"));
    for name in adapters::METHODS {
        let method = adapters::by_name(name, &Settings { steps: Some(100), ..settings }).unwrap();
        assert!(method.name() == name || name == "rslora");
    }
    let both = PerLayer::new(Box::new(Lora::default())).with(Targets::names(&["third"]), Box::new(Full));
    assert!(matches!(
        adapters::attach(&mut net(), &both, &Targets::AllLinear, &[]),
        Err(Error::NoMatch { .. })
    ));
    let both = PerLayer::new(Box::new(Lora::default())).with(Targets::names(&["first"]), Box::new(BitFit));
    assert!(matches!(
        adapters::attach(&mut net(), &both, &Targets::AllLinear, &[]),
        Err(Error::Config { .. })
    ));
}

/// An adapter whose numbers go through a function with a wrong gradient, or the right one.
#[derive(Clone, Debug)]
struct Planted {
    mistake: Arc<Mistake>,
    wrong: bool,
    parameters: Vec<Parameter>,
}

const NAMES: [&str; 6] = ["p0", "p1", "p2", "p3", "p4", "p5"];

impl LinearAdapter for Planted {
    fn method(&self) -> &'static str {
        "planted"
    }

    fn update(&self, _: &Tensor, _: &Tensor, ctx: &Context) -> Result<Tensor> {
        let inputs: Vec<Tensor> = self.parameters.iter().map(|p| p.tensor(ctx)).collect();
        let y = self.mistake.plant(&inputs, self.wrong)?;
        let factors = normal("factors", y.dims(), DType::F64);
        y.mul(&factors)?.sum_all()
    }

    fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        NAMES.into_iter().zip(&self.parameters).collect()
    }

    fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)> {
        NAMES.into_iter().zip(&mut self.parameters).collect()
    }

    fn delta(&self, weight: &Tensor) -> Result<Tensor> {
        Ok(weight.clone())
    }
}

#[test]
fn the_planted_mistakes_are_caught_in_adapters() {
    let count = mistakes::all().len();
    for i in 0..count {
        for wrong in [false, true] {
            let mistake = Arc::new(mistakes::all().swap_remove(i));
            let name = mistake.name;
            let frozen = |i: usize| mistake.frozen().get(i).copied().unwrap_or(false);
            let parameter = |(i, x)| if frozen(i) { Parameter::frozen(x) } else { Parameter::new(x) };
            let inputs = mistake.inputs().unwrap();
            assert!(inputs.len() <= NAMES.len());
            let parameters = inputs.into_iter().enumerate().map(parameter).collect();
            let mut layer = Linear::init(&Init::seeded(2, &Device::cpu()), 3, 4, true).unwrap();
            layer.freeze();
            layer.cast(DType::F64).unwrap();
            layer.attach(Box::new(Planted { mistake, wrong, parameters })).unwrap();
            let x = normal("x", &[5, 3], DType::F64);
            let result = gradcheck::model(&mut layer, |layer, ctx| layer.forward(&x, ctx));
            match wrong {
                false => result.unwrap_or_else(|error| panic!("{name}: {error}")),
                true => assert!(
                    matches!(result, Err(Error::Gradcheck { .. } | Error::Vjp { .. })),
                    "{name}: {result:?}"
                ),
            }
        }
    }
}

/// LoRA with a mistake that one makes in an adapter's forward.
#[derive(Clone, Debug)]
struct WrongLora {
    a: Parameter,
    b: Parameter,
    mistake: &'static str,
}

impl LinearAdapter for WrongLora {
    fn method(&self) -> &'static str {
        "wrong"
    }

    fn update(&self, x: &Tensor, _: &Tensor, ctx: &Context) -> Result<Tensor> {
        let (mut a, mut b, mut input) = (self.a.tensor(ctx), self.b.tensor(ctx), x.clone());
        match self.mistake {
            "a's value, not its tensor" => a = self.a.value().clone(),
            "b's value, not its tensor" => b = self.b.value().clone(),
            "the input detached" => input = x.detach(),
            _ => {}
        }
        let mut low = input.linear(&a, None)?;
        if self.mistake == "the middle detached" {
            low = low.detach();
        }
        low.linear(&b, None)
    }

    fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        vec![("a", &self.a), ("b", &self.b)]
    }

    fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)> {
        vec![("a", &mut self.a), ("b", &mut self.b)]
    }

    fn delta(&self, _: &Tensor) -> Result<Tensor> {
        self.b.value().matmul(self.a.value())
    }
}

#[test]
fn mistakes_of_an_adapters_forward_are_caught() {
    let wrong = [
        "a's value, not its tensor",
        "b's value, not its tensor",
        "the middle detached",
        "the input detached",
    ];
    for mistake in ["none", wrong[0], wrong[1], wrong[2], wrong[3]] {
        let mut layer = Linear::init(&Init::seeded(2, &Device::cpu()), 5, 7, true).unwrap();
        layer.freeze();
        layer.cast(DType::F64).unwrap();
        let [a, b] = [("a", [2, 5]), ("b", [7, 2])].map(|(n, d)| Parameter::new(normal(n, &d, DType::F64)));
        layer.attach(Box::new(WrongLora { a, b, mistake })).unwrap();
        let x = normal("x", &[4, 5], DType::F64);
        let whole = gradcheck::model(&mut layer, |layer, ctx| layer.forward(&x, ctx)?.tanh());
        let of_x = gradcheck::function("x", |x| layer.forward(&x[0], &Context::eval().tracked())?.tanh())
            .check(std::slice::from_ref(&x));
        let caught = [whole, of_x].into_iter().filter(|r| matches!(r, Err(Error::Gradcheck { .. }))).count();
        assert_eq!(caught > 0, mistake != "none", "{mistake}");
    }
}
