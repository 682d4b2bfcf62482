//! Other settings for some layers: a rank and a scale for each, or another method.

use crate::adapters::attach::{LayerInfo, Method, Targets};
use crate::error::{Error, Result};
use crate::nn::LinearAdapter;

/// A method whose settings differ from layer to layer, as PEFT's `rank_pattern` and `alpha_pattern`
/// have it; a layer that several patterns fit has the first.
///
/// What layers share, the bases of RandLoRA say, is shared by the layers with the same settings.
///
/// ```
/// use randlora::adapters::{Lora, PerLayer, Targets, attach};
/// use randlora::nn::{Init, Linear, Module};
/// use randlora::Device;
///
/// let init = Init::seeded(0, &Device::cpu());
/// let mut model = vec![Linear::init(&init, 10, 10, true)?, Linear::init(&init, 10, 10, true)?];
/// let lora = |rank| Box::new(Lora { rank, scale: 16.0 / rank as f64, ..Lora::default() });
/// let method = PerLayer::new(lora(4)).with(Targets::names(&["1"]), lora(2));
/// attach(&mut model, &method, &Targets::AllLinear, &[])?;
/// assert_eq!(model.trainable_count(), 20 * 4 + 20 * 2);
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Debug)]
pub struct PerLayer {
    patterns: Vec<(Targets, Box<dyn Method>)>,
    rest: Box<dyn Method>,
}

impl PerLayer {
    /// These settings for all layers that no pattern fits.
    pub fn new(rest: Box<dyn Method>) -> PerLayer {
        PerLayer { patterns: vec![], rest }
    }

    /// These settings for the layers of these names.
    pub fn with(mut self, layers: Targets, settings: Box<dyn Method>) -> PerLayer {
        self.patterns.push((layers, settings));
        self
    }

    fn methods(&self) -> impl Iterator<Item = &dyn Method> {
        self.patterns.iter().map(|(_, method)| &**method).chain([&*self.rest])
    }
}

impl Method for PerLayer {
    fn name(&self) -> &'static str {
        self.rest.name()
    }

    fn adapters(&self, layers: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        // Which method a layer has: the number of the first pattern that fits, or the one after all.
        let choice = |layer: &LayerInfo| {
            let fits = self.patterns.iter().position(|(targets, _)| targets.matches(&layer.name));
            fits.unwrap_or(self.patterns.len())
        };
        let mut made: Vec<Option<Box<dyn LinearAdapter>>> = layers.iter().map(|_| None).collect();
        for (i, method) in self.methods().enumerate() {
            let places: Vec<usize> = (0..layers.len()).filter(|&at| choice(&layers[at]) == i).collect();
            if places.is_empty() && i < self.patterns.len() {
                let available = layers.iter().map(|layer| layer.name.clone()).collect();
                let wanted = format!("the pattern {:?}", self.patterns[i].0);
                return Err(Error::NoMatch { wanted, available });
            }
            let own: Vec<LayerInfo> = places.iter().map(|&at| layers[at].clone()).collect();
            let Some(adapters) = method.adapters(&own)? else {
                let message = format!("{} has no adapters to give to some layers", method.name());
                return Err(Error::config("method", message));
            };
            for (at, adapter) in places.into_iter().zip(adapters) {
                made[at] = Some(adapter);
            }
        }
        Ok(made.into_iter().collect())
    }
}
