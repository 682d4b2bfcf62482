//! Adapter folders of this crate's own form: what is saved comes back bit for bit, and what does not fit is
//! refused.

use std::collections::{BTreeMap, BTreeSet};
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
        let numbers: usize =
            adapter.adapted().chain(adapter.whole()).map(|(_, sizes)| sizes.iter().product::<usize>()).sum();
        assert_eq!(numbers, net_before.trainable_count(), "{name}");
        let given: Vec<&[usize]> = adapter.given().map(|(_, sizes)| sizes).collect();
        assert_eq!(adapter.tasks(), if name == "atlas" { 2 } else { 0 });
        let sizes: &[&[usize]] =
            if name == "atlas" { &[&[10, 6], &[10, 6], &[7, 10], &[7, 10]] } else { &[] };
        assert_eq!(given, sizes, "{name}");

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
            ["adapter_config.json", "adapter_model.safetensors"]
                .map(|file| fs::read(folder.0.join(file)).unwrap())
        };
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
    let file = "adapter_model.safetensors";
    let saved = |edit: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let folder = Folder::with("own-task-vectors", &[]);
        save_own(&trained(&atlas()), &folder.0, &PeftTask::default()).unwrap();
        let path = folder.0.join(file);
        let stored = SafeTensors::open(&path, Access::Read).unwrap();
        let read = |name: &str| (name.to_string(), stored.tensor(name, &Device::cpu()).unwrap());
        let mut tensors = stored.entries().map(|(name, _)| read(name)).collect();
        edit(&mut tensors);
        save_safetensors(&path, &Vec::from_iter(tensors), &[]).unwrap();
        folder
    };
    let opened = |edit: &dyn Fn(&mut BTreeMap<String, Tensor>)| Adapter::open(&saved(edit).0).unwrap_err();
    let none = opened(&|tensors| tensors.retain(|name, _| !name.contains("tau")));
    says(&none, &[file, "there is no `0.atlas.tau.0`", "train it again"]);
    says(&opened(&|tensors| drop(tensors.remove("1.atlas.tau.0"))), &[file, "no `1.atlas.tau.0`"]);
    says(&opened(&|tensors| drop(tensors.remove("1.atlas.tau.1"))), &[file, "no `1.atlas.tau.1`"]);

    let set = |name: &str, dims: &[usize]| {
        let folder = saved(&|tensors| drop(tensors.insert(name.into(), normal("x", dims))));
        Adapter::open(&folder.0).and_then(|adapter| adapter.attach(&mut net(1))).unwrap_err()
    };
    let to_do = "attach it to the model that it was trained on";
    says(&set("1.atlas.tau.0", &[10, 7]), &[file, "the task vector of `1` is [10, 7]", "[7, 10]", to_do]);
    says(&set("1.atlas.tau.0", &[70]), &[file, "the task vector of `1` is [70]", to_do]);
    says(&set("1.atlas.tau.0", &[]), &[file, "the task vector of `1` is []", to_do]);
    says(&set("1.atlas.tau.2", &[7, 10]), &[file, "no `0.atlas.tau.2`"]);
    for name in ["1.atlas.tau.3", "1.atlas.tau.00", "1.atlas.tau.18446744073709551616", "1.atlas.tau.-1"] {
        says(&set(name, &[7, 10]), &[file, &format!("`{name}` is no part of")]);
    }
    says(&set("2.atlas.tau.0", &[3, 7]), &[file, "`2.atlas.tau.0` is no part of"]);
    says(&set("1.atlas.lambda", &[3]), &[file, "`1.atlas.lambda` is [3]", "needs [2]"]);
}

#[test]
fn task_vectors_of_another_method_are_refused() {
    let folder = Folder::with("own-no-task-vectors", &[]);
    save_own(&trained(&*method("nola")), &folder.0, &PeftTask::default()).unwrap();
    let path = folder.0.join("adapter_model.safetensors");
    folder.rename(&path, "new", |name| Some(name.replace("1.nola.beta", "1.nola.tau.0")));
    fs::rename(folder.0.join("new"), path).unwrap();
    let error = Adapter::open(&folder.0).and_then(|adapter| adapter.attach(&mut net(1))).unwrap_err();
    says(&error, &["adapter_model.safetensors", "1.nola.beta"]);
}

/// What is written last is all that there is.
#[test]
fn a_folder_is_one_adapter() {
    let folder = Folder::with("own-over", &[]);
    let forward = || {
        let mut net = net(1);
        Adapter::open(&folder.0).unwrap().attach(&mut net).unwrap();
        bits(&net, &Context::eval())
    };
    save_own(&trained(&atlas()), &folder.0, &PeftTask::default()).unwrap();
    let before = forward();
    for name in ["nola", "lora", "atlas"] {
        let net = match name {
            "lora" => trained(&Lora::default()),
            name => trained(&*method(name)),
        };
        save_adapter(&net, &folder.0, &PeftTask::default()).unwrap();
        assert_eq!(forward(), bits(&net, &Context::eval()), "{name}");
        let names: BTreeSet<_> =
            fs::read_dir(&folder.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
    }
    assert_eq!(forward(), before);
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
    save_adapter(&wide, &folder.0, &PeftTask::default()).unwrap();
}
