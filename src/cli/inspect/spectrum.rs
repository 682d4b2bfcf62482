//! The singular values of an adapter's updates.

use std::collections::BTreeMap;
use std::path::Path;

use randlora::analysis::{effective_rank, numeric_rank, singular_values};
use randlora::{Result, Tensor};
use serde_json::{Value, json};

use super::{list, string};
use crate::cli::Failure;
use crate::cli::plot::{self, Axis, Curve};

/// What there is to say of an update (out, in).
pub(super) fn describe(delta: &Tensor) -> Result<Value> {
    let values = singular_values(delta)?;
    let side = delta.dims().iter().copied().max().unwrap_or(0) as f64;
    Ok(json!({
        "update_rank": numeric_rank(&values, side * f64::from(f32::EPSILON)),
        "effective_rank": effective_rank(&values),
        "singular_values": values,
    }))
}

/// Below this share of the largest singular value there is nothing but rounding.
const LEAST: f64 = 1e-8;

/// Draws the spectra as shares of the largest value, one curve for the layers whose names end alike: their mean.
pub(super) fn draw(value: &Value, path: &Path) -> std::result::Result<(), Failure> {
    let mut kinds: BTreeMap<String, Vec<Vec<f64>>> = BTreeMap::new();
    for layer in list(value, "layers") {
        let values: Vec<f64> = list(layer, "singular_values").iter().filter_map(Value::as_f64).collect();
        let largest = values.first().copied().filter(|&largest| largest > 0.0).unwrap_or(1.0);
        let shares = values.iter().map(|value| value / largest).collect();
        kinds.entry(kind(&string(layer, "name"))).or_default().push(shares);
    }
    let mean = |spectra: &[Vec<f64>], i: usize| {
        let values = spectra.iter().map(|spectrum| spectrum.get(i).copied().unwrap_or(0.0));
        values.sum::<f64>() / spectra.len() as f64
    };
    let curves: Vec<Curve> = kinds
        .into_iter()
        .map(|(name, spectra)| {
            let count = spectra.iter().map(Vec::len).max().unwrap_or(0);
            let points = (0..count).map(|i| (i as f64 + 1.0, mean(&spectra, i).max(LEAST).log10()));
            Curve { name, points: points.collect() }
        })
        .collect();
    plot::draw(
        path,
        "singular values of ΔW (mean of the layers)",
        ("i", "log10 of σᵢ/σ₁"),
        Axis::Count,
        &curves,
    )?;
    Ok(())
}

/// A layer's name without the numbers in it and what is before the last of them.
fn kind(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    let after = parts.iter().rposition(|part| part.parse::<usize>().is_ok()).map_or(0, |place| place + 1);
    parts[after..].join(".")
}
