//! Several adapters on one model: each alone is as if it were the only one, a weighted sum is the sum of their
//! changes, and the base is there once and comes back bit for bit.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use crate::common::{Folder, close, says, values};
use randlora::adapters::{
    AdaLora, Adapted, Atlas, Attached, BitFit, Dora, Full, Lora, METHODS, Method, RandLora, Settings,
    Targets, TaskVector, Whole, attach, by_name,
};
use randlora::io::{Adapter, PeftTask, save_adapter};
use randlora::nn::{Context, Init, ItemMut, Linear, LinearAdapter, Module, Parameter, checkpoint};
use randlora::optim::{AdamW, Optimizer};
use randlora::{DType, Device, Error, Gradients, Result, Structure, Tensor, gradcheck};

/// A net of two layers and one that adapters hold whole, in a type that they are all in.
#[derive(Clone)]
struct Net {
    layers: Vec<Linear>,
    head: Linear,
}
randlora::module!(Net { layers => "", head });

fn net(dtype: DType) -> Net {
    let init = Init::seeded(1, &Device::cpu());
    let layer = |name, inputs, outputs| Linear::init(&init.at(name), inputs, outputs, true).unwrap();
    let mut net = Net { layers: vec![layer("0", 6, 10), layer("1", 10, 7)], head: layer("head", 7, 3) };
    net.freeze();
    net.cast(dtype).unwrap();
    net
}

fn normal(name: &str, dims: &[usize]) -> Tensor {
    Init::seeded(8, &Device::cpu()).normal(name, dims, 0.3).unwrap()
}

fn forward(net: &Net, ctx: &Context) -> Result<Tensor> {
    let dtype = net.layers[0].bias().unwrap().value().dtype();
    let mut x = normal("x", &[5, 6]).to_dtype(dtype)?;
    for (layer, place) in net.layers.iter().zip(0..) {
        x = layer.forward(&x, &ctx.enter(place))?.gelu()?;
    }
    net.head.forward(&x, &ctx.enter(9))
}

/// The bits of what the net gives.
fn bits(net: &Net, ctx: &Context) -> Vec<u64> {
    values(&forward(net, ctx).unwrap()).into_iter().map(f64::to_bits).collect()
}

/// Attaches a method whose numbers are no longer what they started at, the head with them.
fn trained(net: &mut Net, method: &dyn Method, seed: &str) -> Result<Attached> {
    attach(net, method, &Targets::names(&["0", "1"]), &["head"])?;
    net.try_visit_mut(&mut |name, item| match item {
        ItemMut::Parameter(parameter) if parameter.is_trainable() => {
            let (value, noise) =
                (parameter.value(), normal(&format!("{seed}{name}"), parameter.value().dims()));
            let moved = value.add(&noise.to_dtype(value.dtype())?)?;
            parameter.set(moved)
        }
        _ => Ok(()),
    })?;
    Ok(Attached::of(net))
}

fn atlas() -> Atlas {
    let vector = |task: &str| {
        let tau = |layer: &str, dims: &[usize]| (layer.to_string(), normal(&format!("{task}{layer}"), dims));
        TaskVector::from([tau("0", &[10, 6]), tau("1", &[7, 10])])
    };
    Atlas { vectors: vec![vector("first"), vector("second")] }
}

/// All that can be made here: those that have a name, and aTLAS.
fn methods() -> Vec<&'static str> {
    METHODS.into_iter().chain(["atlas"]).collect()
}

fn method(name: &str) -> Box<dyn Method> {
    if name == "atlas" {
        return Box::new(atlas());
    }
    let rank = (!["svft", "pranc", "intrinsic", "bitfit", "full"].contains(&name)).then_some(3);
    let dropout = if ["svft", "intrinsic", "bitfit", "full"].contains(&name) { 0.0 } else { 0.1 };
    let coefficients = ["nola", "pranc", "intrinsic"].contains(&name).then_some(5);
    by_name(name, &Settings { rank, dropout, coefficients, steps: Some(50), seed: 3, scale: None }).unwrap()
}

/// A net with these methods as adapters, called by the methods' names.
fn adapted(dtype: DType, methods: &[&str]) -> Adapted<Net> {
    let mut net = Adapted::new(net(dtype)).unwrap();
    for name in methods {
        net.add(name, |net| trained(net, &*method(name), name)).unwrap();
    }
    net
}

fn gradients(net: &Net, ctx: &Context) -> Gradients {
    forward(net, ctx).unwrap().powf(2.0).unwrap().sum_all().unwrap().backward().unwrap()
}

/// The gradients of all parameters that have one, by name.
fn by_parameter(net: &Net, ctx: &Context) -> BTreeMap<String, Vec<f64>> {
    let gradients = gradients(net, ctx);
    let one = |(name, p): (String, &Parameter)| Some((name, values(gradients.get(p.leaf())?)));
    net.parameters().into_iter().filter_map(one).collect()
}

#[test]
fn one_active_is_as_if_it_were_the_only_one() {
    let base = bits(&net(DType::F32), &Context::eval());
    for name in methods() {
        let mut alone = net(DType::F32);
        let attached = trained(&mut alone, &*method(name), "here").unwrap();
        let mut several = adapted(DType::F32, &["dora", "randlora"]);
        let name_here = format!("{name}-here");
        let added = several.add(&name_here, |net| trained(net, &*method(name), "here")).unwrap();
        assert_eq!(added, attached, "{name}");
        assert_eq!(bits(several.model(), &Context::eval()), base, "{name}: none is active yet");

        for other in ["dora", "randlora"] {
            several.activate(&name_here).unwrap();
            assert_eq!(several.trainable_count(), alone.trainable_count(), "{name}");
            for ctx in [Context::eval(), Context::train(5, 6)] {
                assert_eq!(bits(several.model(), &ctx), bits(&alone, &ctx), "{name}");
            }
            let ctx = Context::train(5, 6);
            assert_eq!(by_parameter(several.model(), &ctx), by_parameter(&alone, &ctx), "{name}");
            several.activate(other).unwrap();
            assert_ne!(bits(several.model(), &Context::eval()), bits(&alone, &Context::eval()), "{name}");
        }
        several.deactivate().unwrap();
        assert_eq!(bits(several.model(), &Context::eval()), base, "{name}");
        assert_eq!(several.trainable_count(), 0, "{name}");
    }
}

/// y = W0·x + b + Σₖ wₖ·(yₖ − W0·x − b), each yₖ from a layer that has the k-th adapter alone.
#[test]
fn a_weighted_sum_is_the_sum_of_the_changes() {
    let block = RandLora { rank: 3, structure: Structure::Block, ..RandLora::default() };
    let pairs = [
        ("lora", "randlora"),
        ("dora", "pissa"),
        ("hydralora", "adalora"),
        ("vera", "block"),
        ("svft", "nola"),
        ("atlas", "lora"),
    ];
    for (first, second) in pairs {
        let of = |name: &str| if name == "block" { Box::new(block) as Box<dyn Method> } else { method(name) };
        let only = |name: &str| {
            let mut net = net(DType::F64);
            trained(&mut net, &*of(name), name).unwrap();
            net
        };
        let x = normal("in", &[4, 6]).to_dtype(DType::F64).unwrap();
        let run = |net: &Net| net.layers[0].forward(&x, &Context::eval()).unwrap();
        let frozen = run(&net(DType::F64));
        let change = |name, weight| run(&only(name)).sub(&frozen).unwrap().scale(weight).unwrap();
        let want = frozen.add(&change(first, 0.75)).unwrap().add(&change(second, -1.5)).unwrap();

        let mut both = Adapted::new(net(DType::F64)).unwrap();
        for name in [first, second] {
            both.add(name, |net| trained(net, &*of(name), name)).unwrap();
        }
        both.combine(&[(first, 0.75), (second, -1.5)], Whole::Of(second.into())).unwrap();
        // Some twenty operations of f64.
        close(&format!("{first} and {second}"), &values(&run(both.model())), &values(&want), 1e-12);
        if first != "hydralora" {
            let (layer, net) = (&both.model().layers[0], net(DType::F64));
            let weight = net.layers[0].weight().value();
            let delta = |name: &str| only(name).layers[0].adapter().unwrap().delta(weight).unwrap();
            let sum = delta(first).scale(0.75).unwrap().sub(&delta(second).scale(1.5).unwrap()).unwrap();
            close(
                &format!("ΔW of {first} and {second}"),
                &values(&layer.delta().unwrap().unwrap()),
                &values(&sum),
                1e-12,
            );
        }
    }
}

#[test]
fn gradients_of_two_weighted_adapters() {
    let with_adapter: Vec<&str> =
        methods().into_iter().filter(|name| !["bitfit", "full"].contains(name)).collect();
    for (i, first) in with_adapter.iter().enumerate() {
        let second = with_adapter[(i + 1) % with_adapter.len()];
        // DoRA's gradient takes the lengths of rows for constant unless it is told not to.
        let of = |name: &str| match name {
            "dora" => Box::new(Dora { rank: 3, through_norm: true, ..Dora::default() }) as Box<dyn Method>,
            name => method(name),
        };
        let mut net = Adapted::new(self::net(DType::F64)).unwrap();
        for name in [*first, second] {
            net.add(name, |net| trained(net, &*of(name), name)).unwrap();
        }
        net.combine(&[(first, 0.7), (second, -0.4)], Whole::Of(second.into())).unwrap();
        gradcheck::model(net.model_mut(), |net, ctx| forward(net, ctx)?.tanh())
            .unwrap_or_else(|error| panic!("{first} and {second}: {error}"));
        let x = normal("in", &[4, 6]).to_dtype(DType::F64).unwrap();
        let layer = &net.model().layers[0];
        gradcheck::function("x", |x| layer.forward(&x[0], &Context::eval().tracked())?.tanh())
            .check(&[x])
            .unwrap();
    }
}

#[test]
fn only_what_is_active_is_trained() {
    let mut net = adapted(DType::F32, &["lora", "randlora", "vera"]);
    let names = |net: &Adapted<Net>| -> Vec<String> {
        let trained = net.parameters().into_iter().filter(|(_, p)| p.is_trainable()).map(|(name, _)| name);
        let trained: BTreeSet<String> = trained.collect();
        let tracked = forward(net.model(), &Context::train(0, 0)).unwrap().is_tracked();
        assert_eq!(tracked, !trained.is_empty());
        if tracked {
            assert!(by_parameter(net.model(), &Context::train(0, 0)).keys().eq(&trained), "{trained:?}");
        }
        trained.into_iter().collect()
    };
    assert!(names(&net).is_empty());
    let lora = ["0.lora.a", "0.lora.b", "1.lora.a", "1.lora.b", "head.bias", "head.weight"];
    net.activate("lora").unwrap();
    assert_eq!(names(&net), lora);

    net.combine(&[("lora", 0.5), ("vera", 0.5)], Whole::Of("vera".into())).unwrap();
    let all = names(&net);
    assert_eq!(all.len(), 4 + 4 + 2);
    assert!(all.contains(&"0.lora.lora.a".into()) && all.contains(&"1.vera.vera.lambda_d".into()), "{all:?}");
    net.train_only(&["lora"]).unwrap();
    assert_eq!(names(&net), ["0.lora.lora.a", "0.lora.lora.b", "1.lora.lora.a", "1.lora.lora.b"]);
    net.train_only(&["vera"]).unwrap();
    assert_eq!(names(&net).len(), 4 + 2, "the head is vera's");
    assert!(net.train_only(&["randlora"]).unwrap_err().to_string().contains("no active `randlora`"));
    // What was not trained for a while is as before when it is active again.
    net.activate("lora").unwrap();
    assert_eq!(names(&net), lora);
    net.train_only(&[]).unwrap();
    assert!(names(&net).is_empty());
}

/// AdaLoRA remembers how much each of its numbers has mattered.
#[test]
fn nothing_is_lost_while_inactive() {
    let budget = AdaLora { interval: 1, warmup: 0, fixed: 1, rank: 1, first_rank: 3, ..AdaLora::over(8) };
    let add = |net: &mut Net| attach(net, &budget, &Targets::names(&["0", "1"]), &["head"]);
    let steps = |net: &mut Net, optimizer: &mut AdamW, steps: std::ops::Range<u64>| {
        for step in steps {
            let gradients = gradients(net, &Context::train(2, step));
            optimizer.step(net, &gradients, 1e-2).unwrap();
            net.after_step(step as usize, &gradients).unwrap();
        }
    };
    let mut alone = net(DType::F32);
    add(&mut alone).unwrap();
    steps(&mut alone, &mut AdamW::new(), 0..8);

    let mut several = adapted(DType::F32, &["lora"]);
    several.add("mine", add).unwrap();
    let (mut mine, mut other) = (AdamW::new(), AdamW::new());
    for part in [0..3, 3..4, 4..8] {
        several.activate("mine").unwrap();
        steps(several.model_mut(), &mut mine, part.clone());
        several.activate("lora").unwrap();
        steps(several.model_mut(), &mut other, part.clone());
        several.combine(&[("mine", 0.3), ("lora", 0.7)], Whole::Sum).unwrap();
    }
    several.activate("mine").unwrap();
    assert_eq!(bits(several.model(), &Context::eval()), bits(&alone, &Context::eval()));
}

#[test]
fn merged_and_back_to_the_same_bits() {
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        let mut net = adapted(DType::F32, &["lora", "dora", "randlora"]);
        if dtype != DType::F32 {
            net = Adapted::new(self::net(DType::F32)).unwrap();
            let narrow = |net: &mut Net| {
                net.layers.iter_mut().try_for_each(|layer| {
                    layer.try_visit_mut(&mut |name, item| match item {
                        ItemMut::Parameter(p) if name == "weight" || dtype == DType::F64 => p.cast(dtype),
                        _ => Ok(()),
                    })
                })
            };
            narrow(net.model_mut()).unwrap();
            if dtype == DType::F64 {
                net.model_mut().head.cast(dtype).unwrap();
            }
            for name in ["lora", "dora", "randlora"] {
                net.add(name, |net| trained(net, &*method(name), name)).unwrap();
            }
        }
        let weights = |net: &Adapted<Net>| -> Vec<(DType, Vec<f64>)> {
            let layers = net.model().layers.iter().map(|layer| layer.weight().value());
            layers.map(|x| (x.dtype(), values(x))).collect()
        };
        let (base, before) = (bits(net.model(), &Context::eval()), weights(&net));
        net.combine(&[("lora", 0.5), ("dora", 0.25), ("randlora", 0.05)], Whole::Of("dora".into())).unwrap();
        let active = values(&forward(net.model(), &Context::eval()).unwrap());

        let merged = net.merge(None).unwrap();
        assert!(
            merged.len() == 2
                && merged.iter().all(|(_, m)| m.size() > 0.0 && (m.lost() == 0.0) == (dtype != DType::BF16))
        );
        assert!(net.is_merged() && net.model().layers[0].adapter().is_none());
        // Rounding to bf16 loses a 256th.
        let tolerance = if dtype == DType::BF16 { 0.02 } else { 1e-5 };
        close(
            &format!("merged in {dtype}"),
            &values(&forward(net.model(), &Context::eval()).unwrap()),
            &active,
            tolerance,
        );
        assert_ne!(weights(&net), before);
        for error in [
            net.activate("lora").unwrap_err(),
            net.deactivate().unwrap_err(),
            net.remove("lora").unwrap_err(),
            net.merge(None).map(drop).unwrap_err(),
            net.train_only(&["lora"]).unwrap_err(),
            net.add("new", |net| trained(net, &Lora::default(), "new")).unwrap_err(),
        ] {
            says(&error, &["merged into the weights", "`unmerge`"]);
        }

        net.unmerge().unwrap();
        assert_eq!(weights(&net), before);
        assert_eq!(values(&forward(net.model(), &Context::eval()).unwrap()), active);
        assert!(net.unmerge().is_err());
        net.deactivate().unwrap();
        assert_eq!((bits(net.model(), &Context::eval()), weights(&net)), (base, before));
        assert!(net.merge(None).unwrap_err().to_string().contains("none is active"));
    }
}

#[test]
fn a_router_is_summed_and_not_merged() {
    let mut net = adapted(DType::F32, &["lora", "hydralora"]);
    net.combine(&[("lora", 1.0), ("hydralora", 1.0)], Whole::Sum).unwrap();
    let before = bits(net.model(), &Context::eval());
    says(&net.merge(None).map(drop).unwrap_err(), &["`0`", "HydraLoRA", "keep the adapter"]);
    assert!(!net.is_merged());
    assert_eq!(bits(net.model(), &Context::eval()), before);
}

#[test]
fn what_is_held_whole() {
    let mut net = adapted(DType::F64, &["bitfit", "lora", "vera"]);
    let head = |net: &Adapted<Net>| values(net.model().head.weight().value());
    let base = head(&net);
    let mut of = |name: &str| {
        net.activate(name).unwrap();
        head(&net)
    };
    let (lora, vera) = (of("lora"), of("vera"));
    assert!(lora != base && vera != base && lora != vera);
    assert_eq!(net.whole().collect::<Vec<_>>(), ["head.bias", "head.weight"]);

    let error = net.combine(&[("lora", 0.5), ("vera", 0.5)], Whole::Apart).unwrap_err();
    says(&error, &["`head.bias`", "`lora` and `vera`", "Whole::Of", "Whole::Sum"]);
    assert_eq!(net.active(), [("vera".to_string(), 1.0)], "nothing is changed");
    assert_eq!(head(&net), vera);

    net.combine(&[("lora", 0.5), ("vera", 0.5)], Whole::Of("lora".into())).unwrap();
    assert_eq!(head(&net), lora);
    let mix = |a: f64, b: f64| -> Vec<f64> {
        let terms = base.iter().zip(&lora).zip(&vera);
        terms.map(|((p, l), v)| p + a * (l - p) + b * (v - p)).collect()
    };
    for (a, b) in [(0.25, 0.75), (1.0, 1.0), (0.5, -1.0)] {
        net.combine(&[("lora", a), ("vera", b)], Whole::Sum).unwrap();
        close("the sum", &head(&net), &mix(a, b), 1e-15);
        assert!(!net.model().head.weight().is_trainable());
    }
    // One adapter's is its own, whatever the weight of its change.
    net.combine(&[("lora", 0.1)], Whole::Apart).unwrap();
    assert_eq!(head(&net), lora);
    assert_eq!(net.model().layers[0].adapter().unwrap().method(), "weighted");

    // Biases, which BitFit trains, are summed by the same formula.
    let biases = |net: &Adapted<Net>| values(net.model().layers[1].bias().unwrap().value());
    net.deactivate().unwrap();
    let plain = biases(&net);
    net.add("bitfit2", |net| trained(net, &BitFit, "other")).unwrap();
    net.activate("bitfit").unwrap();
    let one = biases(&net);
    net.activate("bitfit2").unwrap();
    let two = biases(&net);
    net.combine(&[("bitfit", 1.0), ("bitfit2", 2.0)], Whole::Sum).unwrap();
    let want: Vec<f64> =
        (0..plain.len()).map(|i| plain[i] + (one[i] - plain[i]) + 2.0 * (two[i] - plain[i])).collect();
    close("biases", &biases(&net), &want, 1e-15);
    net.deactivate().unwrap();
    assert_eq!((head(&net), biases(&net)), (base, plain));
}

#[test]
fn a_weight_that_is_replaced_is_not_changed_too() {
    let mut net = adapted(DType::F32, &["lora"]);
    net.add("full", |net| trained(net, &Full, "full")).unwrap();
    let error = net.combine(&[("lora", 1.0), ("full", 1.0)], Whole::Of("full".into())).unwrap_err();
    says(&error, &["`full` holds `0.weight` whole", "`lora` changes the base's"]);
    // Its biases may be another's.
    net.add("bitfit", |net| attach(net, &BitFit, &Targets::AllLinear, &[])).unwrap();
    net.combine(&[("lora", 1.0), ("bitfit", 1.0)], Whole::Of("lora".into())).unwrap();
    assert_eq!(net.whole().count(), 4);
}

#[test]
fn adapters_come_and_go() {
    let mut net = adapted(DType::F32, &["lora", "vera"]);
    net.combine(&[("lora", 2.0), ("vera", 1.0)], Whole::Of("lora".into())).unwrap();
    let both = bits(net.model(), &Context::eval());
    // One that is added does not show in those that are active; nor one that cannot be.
    net.add("dora", |net| trained(net, &*method("dora"), "dora")).unwrap();
    let fail = |net: &mut Net| {
        trained(net, &Lora::default(), "broken")?;
        Err(Error::Config { what: "test", message: "broken".into() })
    };
    says(&net.add("broken", fail).unwrap_err(), &["broken"]);
    assert_eq!(bits(net.model(), &Context::eval()), both);
    assert_eq!(net.active(), [("lora".to_string(), 2.0), ("vera".to_string(), 1.0)]);
    assert_eq!(net.names().collect::<Vec<_>>(), ["dora", "lora", "vera"]);

    net.remove("dora").unwrap();
    assert_eq!(bits(net.model(), &Context::eval()), both);
    net.remove("vera").unwrap();
    assert_eq!(bits(net.model(), &Context::eval()), bits(&self::net(DType::F32), &Context::eval()));
    assert!(net.active().is_empty());
    net.activate("lora").unwrap();
    let mut alone = self::net(DType::F32);
    trained(&mut alone, &*method("lora"), "lora").unwrap();
    assert_eq!(bits(&net.into_model(), &Context::eval()), bits(&alone, &Context::eval()));
}

#[test]
fn what_cannot_be_is_said() {
    let mut net = adapted(DType::F32, &["lora", "vera"]);
    let combine =
        |net: &mut Adapted<Net>, parts: &[(&str, f64)], whole| net.combine(parts, whole).unwrap_err();
    says(&net.activate("dora").unwrap_err(), &["no `dora`", "there are: lora, vera"]);
    says(&net.remove("dora").unwrap_err(), &["no `dora`", "there are: lora, vera"]);
    says(&combine(&mut net, &[], Whole::Apart), &["at least one", "`deactivate`"]);
    says(&combine(&mut net, &[("lora", 1.0), ("lora", 2.0)], Whole::Sum), &["`lora` comes twice"]);
    for weight in [f64::NAN, f64::INFINITY] {
        says(&combine(&mut net, &[("lora", weight)], Whole::Sum), &["`lora` has ", "finite"]);
    }
    let of = Whole::Of("dora".into());
    says(
        &combine(&mut net, &[("lora", 1.0), ("vera", 1.0)], of),
        &["no active `dora`", "there are: lora, vera"],
    );
    let add = |net: &mut Adapted<Net>, name: &str| {
        net.add(name, |net| trained(net, &Lora::default(), "new")).unwrap_err()
    };
    says(&add(&mut net, "lora"), &["there is a `lora`", "remove it first"]);
    says(&add(&mut net, ""), &["name is empty"]);
    says(&net.unmerge().unwrap_err(), &["none is merged"]);

    let mut taken = self::net(DType::F32);
    attach(&mut taken, &Lora::default(), &Targets::AllLinear, &[]).unwrap();
    says(&Adapted::new(taken).map(drop).unwrap_err(), &["`0`", "`add` it"]);
    // Behind its back.
    net.activate("lora").unwrap();
    let lost = net.model_mut().layers[1].detach().unwrap();
    says(&net.activate("vera").unwrap_err(), &["`1` has lost its own"]);
    says(&net.deactivate().unwrap_err(), &["`1` has lost its own"]);
    net.model_mut().layers[1].attach(lost).unwrap();
    net.activate("vera").unwrap();
}

#[test]
fn an_adapter_is_saved_as_if_it_were_alone() {
    for name in ["randlora", "lora", "nola"] {
        let [alone, several] =
            ["alone", "several"].map(|which| Folder::with(&format!("many-{name}-{which}"), &[]));
        let method: Box<dyn Method> = match name {
            "randlora" => {
                Box::new(RandLora { rank: 3, pairing: randlora::Pairing::Peft, ..RandLora::default() })
            }
            name => method(name),
        };
        let mut one = net(DType::F32);
        trained(&mut one, &*method, name).unwrap();
        save_adapter(&one, &alone.0, &PeftTask::default()).unwrap();

        let mut net = adapted(DType::F32, &["vera"]);
        let opened = Adapter::open(&alone.0).unwrap();
        net.add(name, |net| opened.attach(net)).unwrap();
        net.combine(&[(name, 0.5), ("vera", 2.0)], Whole::Sum).unwrap();
        let error = save_adapter(net.model(), &several.0, &PeftTask::default()).unwrap_err();
        says(&error, &["weighted"]);
        net.activate(name).unwrap();
        save_adapter(net.model(), &several.0, &PeftTask::default()).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            assert_eq!(
                fs::read(alone.0.join(file)).unwrap(),
                fs::read(several.0.join(file)).unwrap(),
                "{name}: {file}"
            );
        }
    }
}

#[test]
fn the_base_is_held_once() {
    let device = Device::cpu();
    let init = Init::seeded(0, &device);
    let layer = |name, outputs| Linear::init(&init.at(name), 256, outputs, true).unwrap();
    let base = Net { layers: vec![layer("0", 256), layer("1", 256)], head: layer("head", 4) };
    let mut net = Adapted::new(base).unwrap();
    let live = || device.memory().live_bytes;
    let start = live();
    let mut adapters = 0;
    for (i, name) in ["a", "b", "c", "d"].into_iter().enumerate() {
        let method = Lora { rank: 2, seed: i as u64, ..Lora::default() };
        let added = net
            .add(name, |net| {
                let attached = attach(net, &method, &Targets::names(&["0", "1"]), &["head"])?;
                // Another head is other memory.
                let value = net.head.weight().value().scale(2.0)?;
                net.try_visit_mut(&mut |name, item| match item {
                    ItemMut::Parameter(p) if name == "head.weight" => p.set(value.clone()),
                    _ => Ok(()),
                })?;
                Ok(attached)
            })
            .unwrap();
        // The head's bias is the base's until it is trained.
        adapters += 4 * (added.trained - 4);
    }
    assert_eq!(live(), start + adapters);
    assert!(adapters < (start / 10) * 4, "{adapters} of {start}");
    for step in 0..3 {
        for name in ["a", "c", "b"] {
            net.activate(name).unwrap();
            assert_eq!(live(), start + adapters, "{name}");
        }
        let parts = [("a", 0.5), ("d", 0.1 * step as f64)];
        net.combine(&parts, Whole::Of("d".into())).unwrap();
        assert_eq!(live(), start + adapters);
        net.combine(&parts, Whole::Sum).unwrap();
        assert_eq!(live(), start + adapters + 4 * (4 * 256 + 4), "a head that is a sum of others");
    }
    // While merged the old weights are kept.
    net.combine(&[("a", 0.5), ("d", 0.5)], Whole::Of("d".into())).unwrap();
    net.merge(None).unwrap();
    assert_eq!(live(), start + adapters + 4 * 2 * 256 * 256);
    net.unmerge().unwrap();
    net.deactivate().unwrap();
    assert_eq!(live(), start + adapters);
    ["a", "b", "c", "d"].iter().for_each(|name| net.remove(name).unwrap());
    assert_eq!(live(), start);
}

/// Bases of one seed are held once, and others are not taken for them.
#[test]
fn equal_bases_are_held_once() {
    for structure in [Structure::Dense, Structure::Block] {
        let device = Device::cpu();
        let init = Init::seeded(0, &device);
        let base = || {
            vec![
                Linear::init(&init.at("0"), 64, 96, true).unwrap(),
                Linear::init(&init.at("1"), 96, 64, true).unwrap(),
            ]
        };
        let method = |seed| RandLora { rank: 4, seed, structure, ..RandLora::default() };
        let add = |net: &mut Adapted<Vec<Linear>>, name: &str, seed| {
            let before = device.memory().live_bytes;
            let added = net.add(name, |net| attach(net, &method(seed), &Targets::AllLinear, &[])).unwrap();
            device.memory().live_bytes - before - 4 * added.trained
        };
        let mut net = Adapted::new(base()).unwrap();
        let bases = add(&mut net, "first", 7);
        assert!(bases > 4 * 4 * (64 + 96 - 1), "{bases}");
        assert_eq!(add(&mut net, "same", 7), 0);
        assert_eq!(add(&mut net, "other", 8), bases);
        // Who shares keeps them.
        net.remove("first").unwrap();
        net.activate("same").unwrap();
        let mut alone = base();
        attach(&mut alone, &method(7), &Targets::AllLinear, &[]).unwrap();
        let run = |net: &mut [Linear]| {
            for (_, parameter) in net[0].adapter_mut().unwrap().parameters_mut() {
                parameter.set(normal("numbers", parameter.value().dims())).unwrap();
            }
            values(&net[0].delta().unwrap().unwrap())
        };
        assert_eq!(run(net.model_mut()), run(&mut alone));
        assert_eq!(add(&mut net, "again", 7), 0);
    }
}

/// The inside is computed again, with the same masks and for the parameters of both.
#[test]
fn a_weighted_sum_under_a_checkpoint() {
    let mut net = adapted(DType::F32, &["lora", "randlora"]);
    net.combine(&[("lora", 0.5), ("randlora", 0.1)], Whole::Of("lora".into())).unwrap();
    let (net, ctx) = (net.into_model(), Context::train(3, 4));
    let plain = by_parameter(&net, &ctx);
    let x = normal("x", &[5, 6]);
    let y = checkpoint(&net, [&x], &ctx, |net: &Net, _, ctx| forward(net, ctx)).unwrap();
    let gradients = y.powf(2.0).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(plain.len() > 8);
    for (name, parameter) in net.parameters().into_iter().filter(|(_, p)| p.is_trainable()) {
        assert_eq!(values(gradients.get(parameter.leaf()).unwrap()), plain[&name], "{name}");
    }
}

/// x·Wᵀ whose W is not in the graph.
#[derive(Clone, Debug)]
struct Cut(Parameter);

impl LinearAdapter for Cut {
    fn method(&self) -> &'static str {
        "cut"
    }

    fn update(&self, x: &Tensor, _: &Tensor, _: &Context) -> Result<Tensor> {
        x.linear(self.0.value(), None)
    }

    fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        vec![("w", &self.0)]
    }

    fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)> {
        vec![("w", &mut self.0)]
    }

    fn delta(&self, _: &Tensor) -> Result<Tensor> {
        Ok(self.0.value().clone())
    }
}

#[test]
fn a_cut_gradient_in_a_sum_is_caught() {
    let mut net = adapted(DType::F64, &["lora"]);
    let cut = |net: &mut Net| {
        let weight = normal("cut", &[10, 6]).to_dtype(DType::F64)?;
        net.layers[0].attach(Box::new(Cut(Parameter::new(weight))))?;
        Ok(Attached::of(net))
    };
    net.add("mine", cut).unwrap();
    net.combine(&[("lora", 0.7), ("mine", 1.3)], Whole::Apart).unwrap();
    let result = gradcheck::model(net.model_mut(), |net, ctx| forward(net, ctx)?.tanh());
    assert!(matches!(&result, Err(Error::Gradcheck { what, .. }) if what == "`0.mine.cut.w`"), "{result:?}");
    net.train_only(&["lora"]).unwrap();
    gradcheck::model(net.model_mut(), |net, ctx| forward(net, ctx)?.tanh()).unwrap();
}
