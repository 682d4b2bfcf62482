//! Adapter folders.

use std::path::Path;

use randlora::Device;
use randlora::analysis::norm;
use randlora::io::{Access, Adapter, Checkpoint, OwnAdapter, PeftAdapter};
use randlora::nn::{Linear, LinearAdapter, Module};
use rayon::prelude::*;
use serde_json::{Value, json};

use super::{Args, head, labels_lines, line, list, number, shape, spectrum, string};
use crate::cli::model::adapted;
use crate::cli::{Failure, output};

/// An adapter, and with its model how large its updates are.
pub(super) fn describe(args: &Args) -> Result<Value, Failure> {
    let (adapter, device) = (args.draw.open(&args.path)?, Device::cpu());
    let layers = match (&args.model, &adapter) {
        (Some(model), _) => layers_of_model(&adapter, model, args.spectrum || args.plot.is_some(), &device)?,
        (None, Adapter::Peft(adapter)) => layers_of_file(adapter, &device)?,
        (None, Adapter::Own(adapter)) => layers_of_own(adapter, &device)?,
    };
    let whole: Vec<Value> = adapter
        .whole()
        .into_iter()
        .map(|(name, sizes)| {
            json!({ "name": name, "shape": sizes, "parameters": sizes.iter().product::<usize>() })
        })
        .collect();
    let sum = |parts: &[Value]| parts.iter().map(|part| number(part, "parameters")).sum::<u64>();
    let (in_layers, in_whole) = (sum(&layers), sum(&whole));
    let mut value = match &adapter {
        Adapter::Peft(adapter) => about_peft(adapter, &device)?,
        Adapter::Own(adapter) => about_own(adapter)?,
    };
    value["kind"] = json!("adapter");
    value["trained_parameters"] = json!(in_layers + in_whole);
    value["adapter_parameters"] = json!(in_layers);
    value["whole_parameters"] = json!(in_whole);
    value["layers"] = json!(layers);
    value["whole"] = json!(whole);
    Ok(value)
}

fn about_peft(adapter: &PeftAdapter, device: &Device) -> Result<Value, Failure> {
    let config = adapter.config();
    let bases = adapter
        .bases(device)?
        .map(|bases| json!({ "a": bases.a().dims(), "b": bases.b_shape().dims(), "bytes": bases.bytes() }));
    Ok(json!({
        "method": config.method(),
        "rank": config.rank,
        "scale": config.scale,
        "dropout": config.dropout,
        "base_model": config.base_model,
        "bases": bases,
    }))
}

/// Its settings by their names; numbers where they are some.
fn about_own(adapter: &OwnAdapter) -> Result<Value, Failure> {
    let mut value = json!({ "method": adapter.method(), "base_model": adapter.base_model(), "bases": null });
    for (name, text) in adapter.settings()? {
        value[name] = serde_json::from_str(text).unwrap_or_else(|_| json!(text));
    }
    if adapter.tasks() > 0 {
        let sizes = adapter.given().map(|(_, sizes)| sizes.iter().product::<usize>());
        value["vectors"] = json!(adapter.tasks());
        value["given_parameters"] = json!(sizes.sum::<usize>());
    }
    Ok(value)
}

fn layers_of_own(adapter: &OwnAdapter, device: &Device) -> Result<Vec<Value>, Failure> {
    let mut layers = Vec::new();
    for name in adapter.layers() {
        let path = format!("{name}.{}.", adapter.method());
        let own: Vec<(&str, &[usize])> =
            adapter.adapted().filter(|(parameter, _)| parameter.starts_with(&path)).collect();
        let parameters = own.iter().map(|(_, sizes)| sizes.iter().product::<usize>()).sum::<usize>();
        let mut layer = json!({ "name": name, "parameters": parameters });
        for (parameter, _) in own {
            layer[&parameter[path.len()..]] = json!(norm(&adapter.tensor(parameter, device)?)?);
        }
        layers.push(layer);
    }
    Ok(layers)
}

fn layers_of_file(adapter: &PeftAdapter, device: &Device) -> Result<Vec<Value>, Failure> {
    let mut names: Vec<&String> = adapter.layers().iter().collect();
    names.sort_by_key(|name| natural(name));
    let mut layers = Vec::new();
    for name in names {
        let matrices = adapter.layer(name, device)?;
        let mut layer =
            json!({ "name": name, "parameters": matrices.iter().map(|(_, x)| x.numel()).sum::<usize>() });
        for (part, matrix) in &matrices {
            layer[*part] = json!(norm(matrix)?);
        }
        layers.push(layer);
    }
    Ok(layers)
}

/// In the order in which people count: layer 2 before layer 10.
fn natural(name: &str) -> Vec<(usize, &str)> {
    name.split('.').map(|part| (part.parse().unwrap_or(usize::MAX), part)).collect()
}

fn layers_of_model(
    adapter: &Adapter,
    folder: &Path,
    spectrum: bool,
    device: &Device,
) -> Result<Vec<Value>, Failure> {
    let checkpoint = Checkpoint::open(folder, Access::Map)?;
    let model = adapted(&checkpoint, Some(adapter), device)?;
    let layers: Vec<(String, &Linear)> =
        model.linears().into_iter().filter(|(_, layer)| layer.adapter().is_some()).collect();
    let one =
        |(name, layer): &(String, &Linear)| layer.adapter().map(|a| layer_of_model(name, layer, a, spectrum));
    layers.par_iter().filter_map(one).collect()
}

fn layer_of_model(
    name: &str,
    layer: &Linear,
    adapter: &dyn LinearAdapter,
    spectrum: bool,
) -> Result<Value, Failure> {
    let parameters: usize = adapter.parameters().iter().map(|(_, parameter)| parameter.value().numel()).sum();
    let weight = norm(layer.weight().value())?;
    // HydraLoRA's update depends on the input: it has no size.
    let update = adapter.delta(layer.weight().value()).ok();
    let delta = update.as_ref().map(norm).transpose()?;
    let mut value = json!({
        "name": name,
        "inputs": layer.inputs(),
        "outputs": layer.outputs(),
        "parameters": parameters,
        "delta": delta,
        "relative": delta.map(|delta| delta / weight),
    });
    for (part, parameter) in adapter.parameters() {
        value[part] = json!(norm(parameter.value())?);
    }
    if spectrum
        && let Some(update) = update
        && let (Some(value), Value::Object(found)) = (value.as_object_mut(), spectrum::describe(&update)?)
    {
        value.extend(found);
    }
    Ok(value)
}

/// The same to read.
pub(super) fn text(value: &Value) -> String {
    let mut about =
        vec![line("method", string(value, "method")), line("base model", string(value, "base_model"))];
    let settings =
        ["rank", "first_rank", "heads", "coefficients", "band", "vectors", "scale", "dropout", "seed"];
    let there = settings.into_iter().filter(|name| !value[*name].is_null());
    about.extend(there.map(|name| line(name, value[name].to_string())));
    about.extend(labels_lines(value));
    about.push(line("trained parameters", output::count(number(value, "trained_parameters"))));
    about.push(line("of adapters", output::count(number(value, "adapter_parameters"))));
    about.push(line("of whole modules", output::count(number(value, "whole_parameters"))));
    if let Some(given) = value["given_parameters"].as_u64() {
        about.push(line("given, not trained", output::count(given)));
    }
    if let bases @ Value::Object(_) = &value["bases"] {
        let (a, b) = (shape(bases, "a"), shape(bases, "b"));
        about.push(line("bases", format!("A {a}, B {b}, {}", output::size(number(bases, "bytes")))));
    }
    let mut text = format!("{}\n{}", output::table(&about), layers_table(value));
    if !list(value, "whole").is_empty() {
        let mut lines = vec![head(&["trained whole", ">shape", ">parameters"])];
        for part in list(value, "whole") {
            let parameters = output::count(number(part, "parameters"));
            lines.push(vec![string(part, "name"), shape(part, "shape"), parameters]);
        }
        text += &format!("\n{}", output::table(&lines));
    }
    text
}

fn layers_table(value: &Value) -> String {
    let columns = [
        ("lambda", ">‖λ‖"),
        ("gamma", ">‖γ‖"),
        ("a", ">‖A‖"),
        ("b", ">‖B‖"),
        ("magnitude", ">‖m‖"),
        ("lambda_b", ">‖λ_b‖"),
        ("lambda_d", ">‖λ_d‖"),
        ("r", ">‖R‖"),
        ("m", ">‖M‖"),
        ("e", ">‖E‖"),
        ("router", ">‖G‖"),
        ("alpha", ">‖α‖"),
        ("beta", ">‖β‖"),
        ("theta", ">‖θ‖"),
        ("delta", ">‖ΔW‖"),
        ("relative", ">‖ΔW‖/‖W‖"),
        ("update_rank", ">rank"),
        ("effective_rank", ">effective rank"),
    ];
    let layers = list(value, "layers");
    let there = |field: &str| layers.first().is_some_and(|layer| layer.get(field).is_some());
    let columns: Vec<(&str, &str)> = columns.into_iter().filter(|(field, _)| there(field)).collect();
    let titles = columns.iter().map(|(_, title)| *title);
    let mut lines = vec![head(&["layer", ">parameters"].into_iter().chain(titles).collect::<Vec<_>>())];
    for layer in layers {
        let mut line = vec![string(layer, "name"), output::count(number(layer, "parameters"))];
        // JSON has no NaN: a number that is not finite is null there.
        line.extend(columns.iter().map(|(field, _)| match layer[*field].as_f64() {
            Some(rank) if layer[*field].is_u64() => format!("{rank}"),
            Some(norm) => format!("{norm:.4}"),
            None => "not finite".into(),
        }));
        lines.push(line);
    }
    output::table(&lines)
}
