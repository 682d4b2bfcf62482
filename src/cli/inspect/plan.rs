//! What training a model by a method would take. The memory is measured, not estimated: two steps are
//! made on tokens without meaning, of which the second has the optimiser's moments from its start.

use std::any::Any;

use randlora::adapters::RandLoraAdapter;
use randlora::io::Access;
use randlora::models::Bert;
use randlora::nn::{Context, Linear, Module, TokenIds};
use randlora::optim::{AdamW, Optimizer};
use randlora::{Device, Tensor};
use serde_json::{Value, json};

use super::{Args, head, line, list, number, string};
use crate::cli::method::{CLASSIFIER, MethodName, Scale, Settings};
use crate::cli::progress::Progress;
use crate::cli::task_vectors::Folders;
use crate::cli::{Failure, made_up, output};

const STEPS: u64 = 2;

/// The plan.
pub(super) fn describe(args: &Args, method: MethodName) -> Result<Value, Failure> {
    let device = Device::cpu();
    let rank = args.rank.map(|rank| rank as usize).or(method.default_rank());
    let Args { targets, bases, task_vectors, draw, .. } = args;
    let settings = Settings {
        method,
        targets,
        rank,
        scale: Scale::Auto,
        bases: *bases,
        dropout: 0.0,
        seed: 0,
        coefficients: args.coefficients.map(|count| count as usize),
        // How many there will be changes nothing of the first two.
        steps: 1000,
        vectors: Folders { folders: task_vectors, draw: *draw, access: Access::Map },
    };
    let labels = args.labels.map(|labels| labels as usize);
    // Not mapped: what the device counts is then all that there is.
    let mut model = made_up::model(&args.path, Access::Read, labels, &settings, &device)?;
    let config = *model.config();
    let length = args.length.map_or(config.positions.min(128), |length| length as usize);
    made_up::check_length(&args.path, length, &config)?;
    let peak = peak_bytes(&mut model, args.batch_size as usize, length, &device)?;
    let mut value = numbers(&model);
    value["kind"] = json!("plan");
    value["method"] = json!(method.name());
    value["rank"] = json!(rank);
    value["labels"] = json!(config.labels);
    value["batch_size"] = json!(args.batch_size);
    value["length"] = json!(length);
    value["training_peak_bytes"] = json!(peak);
    Ok(value)
}

fn is_of_classifier(name: &str) -> bool {
    name.split('.').next() == Some(CLASSIFIER)
}

/// The most bytes that the device holds at a time in training, weights included.
fn peak_bytes(model: &mut Bert, rows: usize, length: usize, device: &Device) -> Result<usize, Failure> {
    let texts = made_up::texts(rows, length, model.config());
    let texts: Vec<&TokenIds> = texts.iter().collect();
    let progress = Progress::new(STEPS);
    progress.stage("making two steps of training to measure their memory");
    device.reset_peaks();
    let mut optimizer = AdamW::new();
    for step in 0..STEPS {
        let loss = made_up::loss(model, &texts, &Context::train(0, step))?;
        made_up::finite(&loss, step as usize)?;
        optimizer.step(model, &loss.backward()?, 1e-4)?;
        progress.advance(1);
    }
    progress.finish();
    Ok(device.memory().peak_bytes)
}

/// What follows from the model and what of it is trained.
fn numbers(model: &Bert) -> Value {
    let parameters = model.parameters();
    let bytes = |trained: bool| -> usize {
        let of = parameters.iter().filter(|(_, parameter)| parameter.is_trainable() == trained);
        of.map(|(_, parameter)| bytes(parameter.value())).sum()
    };
    let classifier = parameters.iter().filter(|(name, p)| is_of_classifier(name) && p.is_trainable());
    let layers: Vec<Value> =
        model.linears().iter().filter_map(|(name, layer)| adapted(name, layer)).collect();
    json!({
        "parameters": model.parameter_count(),
        "trained_parameters": model.trainable_count(),
        "adapter_parameters": layers.iter().map(|layer| number(layer, "parameters")).sum::<u64>(),
        "classifier_parameters": classifier.map(|(_, parameter)| parameter.value().numel()).sum::<usize>(),
        "layers": layers,
        "frozen_bytes": bytes(false),
        "bases_bytes": bases_bytes(model),
        "given_bytes": given_bytes(model),
        "trained_bytes": bytes(true),
        "gradient_bytes": bytes(true),
        "moment_bytes": 2 * bytes(true),
    })
}

fn adapted(name: &str, layer: &Linear) -> Option<Value> {
    let parameters = layer.adapter()?.parameters();
    Some(json!({
        "name": name,
        "inputs": layer.inputs(),
        "outputs": layer.outputs(),
        "parameters": parameters.iter().map(|(_, parameter)| parameter.value().numel()).sum::<usize>(),
    }))
}

/// All layers share them.
fn bases_bytes(model: &Bert) -> usize {
    let bases = model.linears().into_iter().find_map(|(_, layer)| {
        let adapter: &dyn Any = layer.adapter()?;
        adapter.downcast_ref::<RandLoraAdapter>().map(RandLoraAdapter::bases)
    });
    bases.map_or(0, |bases| bases.bytes())
}

/// aTLAS's task vectors.
fn given_bytes(model: &Bert) -> usize {
    let adapters = model.linears().into_iter().filter_map(|(_, layer)| layer.adapter());
    adapters.flat_map(|adapter| adapter.given()).map(bytes).sum()
}

fn bytes(x: &Tensor) -> usize {
    x.numel() * x.dtype().size()
}

/// The same to read.
pub(super) fn text(value: &Value) -> String {
    let trained = number(value, "trained_parameters");
    let percent = 100.0 * trained as f64 / number(value, "parameters").max(1) as f64;
    let mut about = vec![line("method", string(value, "method"))];
    if let Some(rank) = value["rank"].as_u64() {
        about.push(line("rank", output::count(rank)));
    }
    let count = |field: &str| output::count(number(value, field));
    let size = |field: &str| output::size(number(value, field));
    let steps = format!("{} texts of {} tokens", count("batch_size"), count("length"));
    about.extend([
        line("labels", count("labels")),
        line("parameters", count("parameters")),
        line("trained", format!("{} ({percent:.2} %)", output::count(trained))),
        line("of adapters", count("adapter_parameters")),
        line("of the classifier", count("classifier_parameters")),
        line("frozen weights", size("frozen_bytes")),
        line("bases", size("bases_bytes")),
    ]);
    if number(value, "given_bytes") > 0 {
        about.push(line("task vectors", size("given_bytes")));
    }
    about.extend([
        line("trained weights", size("trained_bytes")),
        line("gradients", size("gradient_bytes")),
        line("AdamW's moments", size("moment_bytes")),
        line("peak in training", format!("{} (measured, {steps})", size("training_peak_bytes"))),
    ]);
    let mut text = output::table(&about);
    let layers = list(value, "layers");
    if !layers.is_empty() {
        let title = format!("{} adapted layers", layers.len());
        let mut lines = vec![head(&[&title, ">inputs", ">outputs", ">parameters"])];
        for layer in layers {
            let count = |field: &str| output::count(number(layer, field));
            lines.push(vec![string(layer, "name"), count("inputs"), count("outputs"), count("parameters")]);
        }
        text += &format!("\n{}", output::table(&lines));
    }
    text
}
