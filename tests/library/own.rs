//! Adapter folders of this crate's own form: what is saved comes back bit for bit, and what does not fit is
//! refused.

use std::collections::BTreeMap;
use std::fs;

use crate::common::{Folder, says};
use randlora::adapters::{
    Atlas, BitFit, Lora, Method, Nola, PerLayer, Settings, Svft, Targets, attach, by_name, task_vector,
};
use randlora::io::{
    Access, Adapter, OwnAdapter, PeftTask, SafeTensors, save_adapter, save_own, save_safetensors,
};
use randlora::nn::{Context, Init, Linear, Module};
use randlora::{DType, Device, Error, Tensor};

const METHODS: [&str; 11] = [
    "dora",
    "vera",
    "pissa",
    "lora-xs",
    "svft",
    "adalora",
    "hydralora",
    "nola",
    "pranc",
    "intrinsic",
    "atlas",
];

/// Two layers, and one that is trained whole.
fn net(seed: u64) -> Vec<Linear> {
    let init = Init::seeded(seed, &Device::cpu());
    let layer = |name, inputs, outputs| Linear::init(&init.at(name), inputs, outputs, true).unwrap();
    vec![layer("0", 6, 10), layer("1", 10, 7), layer("2", 7, 3)]
}

fn normal(name: &str, dims: &[usize]) -> Tensor {
    Init::seeded(8, &Device::cpu()).normal(name, dims, 0.3).unwrap()
}

/// An adapted net whose trained numbers are no longer what they started at.
fn trained(method: &dyn Method) -> Vec<Linear> {
    let mut net = net(1);
    attach(&mut net, method, &Targets::names(&["0", "1"]), &["2"]).unwrap();
    net.try_visit_mut(&mut |name, item| match item {
        randlora::nn::ItemMut::Parameter(parameter) if parameter.is_trainable() => {
            let noise = normal(name, parameter.value().dims());
            parameter.set(parameter.value().add(&noise)?)
        }
        _ => Ok(()),
    })
    .unwrap();
    net
}

/// The task vectors of two nets.
fn atlas() -> Atlas {
    let vector = |seed| task_vector(&net(1), &net(seed), &Targets::names(&["0", "1"])).unwrap();
    Atlas { vectors: vec![vector(2), vector(3)] }
}

fn method(name: &str) -> Box<dyn Method> {
    if name == "atlas" {
        return Box::new(atlas());
    }
    // Numbers that no short decimal is.
    let scale = (!["vera", "svft", "intrinsic"].contains(&name)).then_some(2.0 / 3.0);
    let rank = (!["svft", "pranc", "intrinsic"].contains(&name)).then_some(4);
    let coefficients = ["nola", "pranc", "intrinsic"].contains(&name).then_some(5);
    let dropout = if ["svft", "intrinsic"].contains(&name) { 0.0 } else { 0.1 };
    let seed = u64::MAX - 6;
    by_name(name, &Settings { rank, scale, dropout, seed, coefficients, steps: Some(50) }).unwrap()
}

fn bits(net: &[Linear], ctx: &Context) -> Vec<u32> {
    let mut x = normal("x", &[5, 6]);
    for layer in net {
        x = layer.forward(&x, ctx).unwrap();
    }
    x.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn every_method_comes_back_bit_for_bit() {
    let task = PeftTask { name: Some("SEQ_CLS".into()), base_model: Some("base".into()) };
    for name in METHODS {
        let (net_before, folder) = (trained(&*method(name)), Folder::with(&format!("own-{name}"), &[]));
        save_own(&net_before, &folder.0, &task).unwrap();
        let adapter = OwnAdapter::open(&folder.0).unwrap();
        assert_eq!((adapter.method(), adapter.base_model()), (name, Some("base")));
        assert_eq!(adapter.layers(), ["0", "1"]);
        let whole: Vec<&str> = adapter.whole().map(|(name, _)| name).collect();
        assert_eq!(whole, ["2.bias", "2.weight"]);

        let mut again = net(1);
        let attached = Adapter::open(&folder.0).unwrap().attach(&mut again).unwrap();
        assert_eq!(attached.trained, net_before.trainable_count(), "{name}");
        // With dropout in training, so that its rate and place are the same too.
        for ctx in [Context::eval(), Context::train(1, 2)] {
            assert_eq!(bits(&again, &ctx), bits(&net_before, &ctx), "{name}");
        }
        let recipes = |net: &[Linear]| net[1].adapter().unwrap().recipe();
        assert_eq!(recipes(&again), recipes(&net_before));
        assert_ne!(bits(&again, &Context::eval()), bits(&net(1), &Context::eval()), "{name}");
        // Saved again, the files are the same.
        let files = |folder: &Folder| {
            ["adapter_config.json", "adapter_model.safetensors", "adapter_given.safetensors"]
                .map(|file| fs::read(folder.0.join(file)).ok())
        };
        assert_eq!(files(&folder).map(|file| file.is_some()), [true, true, name == "atlas"]);
        let copy = Folder::with(&format!("own-{name}-again"), &[]);
        save_own(&again, &copy.0, &task).unwrap();
        assert_eq!(files(&copy), files(&folder), "{name}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let saved = || {
        let folder = Folder::with("own-refused", &[]);
        save_adapter(&trained(&*method("nola")), &folder.0, &PeftTask::default()).unwrap();
        folder
    };
    let open = |edit: &dyn Fn(&Folder)| {
        let folder = saved();
        edit(&folder);
        Adapter::open(&folder.0).and_then(|adapter| adapter.attach(&mut net(1))).unwrap_err()
    };
    let config = |from: &'static str, to: &'static str| {
        open(&move |folder: &Folder| folder.edit("adapter_config.json", from, to))
    };
    says(&config("\"nola\"", "\"nala\""), &["adapter_config.json", "the method `nala`", "dora, vera"]);
    says(&config("\"rank\": \"4\"", "\"rank\": \"four\""), &["rank", "`four` is no such setting"]);
    says(&config("\"rank\": \"4\"", "\"drank\": \"4\""), &["rank", "missing"]);
    says(&config("\"rank\": \"4\"", "\"rank\": 4"), &["settings", "an object of texts"]);
    says(&config("\"coefficients\": \"5\"", "\"coefficients\": \"6\""), &["0.nola.alpha", "[5]", "[6]"]);
    says(&config("\"0\",\n    \"1\"", ""), &["names no layer"]);
    says(&config("\"0\",\n    \"1\"", "\"0\""), &["1.nola.", "no part of what is trained"]);
    says(&config("\"1\"", "\"7\""), &["`7`"]);
    assert!(matches!(config("RANDLORA_RS", "NOLA"), Error::Data { .. }));

    let tensors = |keep: &'static str, rename: Option<&'static str>| {
        open(&move |folder: &Folder| {
            let file = folder.0.join("adapter_model.safetensors");
            folder.rename(&file, "new", |name| {
                if name == keep { rename.map(String::from) } else { Some(name.into()) }
            });
            fs::rename(folder.0.join("new"), file).unwrap();
        })
    };
    says(&tensors("1.nola.beta", None), &["1.nola.beta"]);
    says(&tensors("2.bias", Some("3.bias")), &["2.bias"]);
}

#[test]
fn task_vectors_that_do_not_fit_are_refused() {
    let given = "adapter_given.safetensors";
    let open = |edit: &dyn Fn(&Folder)| {
        let folder = Folder::with("own-task-vectors", &[]);
        save_own(&trained(&atlas()), &folder.0, &PeftTask::default()).unwrap();
        edit(&folder);
        Adapter::open(&folder.0).and_then(|adapter| adapter.attach(&mut net(1))).unwrap_err()
    };
    let count = |count: &str| {
        let to = format!("\"vectors\": \"{count}\"");
        open(&|folder: &Folder| folder.edit("adapter_config.json", "\"vectors\": \"2\"", &to))
    };
    says(&count("0"), &["at least one"]);
    says(&count("1"), &["0.atlas.lambda", "[2]", "[1]"]);
    says(&count("18446744073709551615"), &[given, "`0.atlas.tau.2`"]);
    says(&count("-1"), &["adapter_config.json", "vectors", "`-1` is no such setting"]);
    let remove = |folder: &Folder| fs::remove_file(folder.0.join(given)).unwrap();
    says(&open(&remove), &["adapter_config.json", given, "missing"]);
    says(&open(&|folder: &Folder| fs::write(folder.0.join(given), "no tensors").unwrap()), &[given]);

    let tensors = |edit: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        open(&|folder: &Folder| {
            let file = SafeTensors::open(&folder.0.join(given), Access::Read).unwrap();
            let read = |name: &str| (name.to_string(), file.tensor(name, &Device::cpu()).unwrap());
            let mut tensors = file.entries().map(|(name, _)| read(name)).collect();
            edit(&mut tensors);
            save_safetensors(&folder.0.join(given), &Vec::from_iter(tensors), &[]).unwrap();
        })
    };
    let set = |name: &'static str, dims: &'static [usize]| {
        tensors(&move |tensors: &mut BTreeMap<String, Tensor>| {
            tensors.insert(name.into(), normal("x", dims));
        })
    };
    says(&tensors(&|tensors| drop(tensors.remove("1.atlas.tau.1"))), &[given, "`1.atlas.tau.1`"]);
    says(&set("1.atlas.tau.0", &[10, 7]), &["the task vector of `1` is [10, 7]", "[7, 10]"]);
    says(&set("1.atlas.tau.0", &[70]), &["the task vector of `1` is [70]"]);
    says(&set("1.atlas.tau.2", &[7, 10]), &[given, "`1.atlas.tau.2` is no part of this adapter"]);
    says(&set("2.atlas.tau.0", &[3, 7]), &[given, "`2.atlas.tau.0` is no part of this adapter"]);
}

#[test]
fn what_cannot_be_made_again_is_not_saved() {
    let folder = Folder::with("own-not-saved", &[]);
    let error = |net: &[Linear]| {
        let net: Vec<Linear> = net.to_vec();
        save_adapter(&net, &folder.0, &PeftTask::default()).unwrap_err()
    };
    let lora = save_own(&trained(&Lora::default()), &folder.0, &PeftTask::default()).unwrap_err();
    says(&lora, &["lora cannot be saved in this form"]);
    let one = Atlas { vectors: atlas().vectors.split_off(1) };
    let uneven = PerLayer::new(Box::new(atlas())).with(Targets::names(&["1"]), Box::new(one));
    says(&error(&trained(&uneven)), &["`1` has other settings"]);
    let two = PerLayer::new(Box::new(Nola::default()))
        .with(Targets::names(&["1"]), Box::new(Nola { rank: 2, ..Nola::default() }));
    says(&error(&trained(&two)), &["`1` has other settings"]);
    let kinds =
        PerLayer::new(Box::new(Svft::default())).with(Targets::names(&["1"]), Box::new(Lora::default()));
    assert!(matches!(error(&trained(&kinds)), Error::Config { .. }));
    says(&error(&trained(&BitFit)), &["none to save"]);
    let mut wide = net(1);
    wide.cast(DType::F64).unwrap();
    attach(&mut wide, &*method("svft"), &Targets::names(&["0"]), &[]).unwrap();
    // Over an adapter with task vectors, of which nothing is left.
    save_own(&trained(&atlas()), &folder.0, &PeftTask::default()).unwrap();
    save_adapter(&wide, &folder.0, &PeftTask::default()).unwrap();
    Adapter::open(&folder.0).unwrap().attach(&mut net(1)).unwrap();
}
