//! The first values of parameters.

use crate::cpu::parallel::{self, GRAIN};
use crate::device::Device;
use crate::dtype::DType;
use crate::error::Result;
use crate::nn::join;
use crate::random;
use crate::shape::IntoShape;
use crate::tensor::Tensor;

/// Makes the first values of parameters. Each is a function of the seed and the parameter's name
/// alone: a model that gets one more part keeps the values of all others.
///
/// ```
/// use randlora::{Device, nn::Init};
///
/// let init = Init::seeded(7, &Device::cpu());
/// let one = init.at("encoder.0").normal("weight", [3, 2], 0.02)?;
/// let same = init.normal("encoder.0.weight", [3, 2], 0.02)?;
/// assert_eq!(one.to_vec::<f32>()?, same.to_vec::<f32>()?);
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Init {
    device: Device,
    seed: Option<u64>,
    path: String,
    linear_std: Option<f64>,
}

impl Init {
    /// Values in f32 from this seed.
    pub fn seeded(seed: u64, device: &Device) -> Init {
        Init { device: device.clone(), seed: Some(seed), path: String::new(), linear_std: None }
    }

    /// Zeros everywhere that take no memory: for a model whose values are read from a file next.
    pub fn blank(device: &Device) -> Init {
        Init { device: device.clone(), seed: None, path: String::new(), linear_std: None }
    }

    /// The same for a part of the model.
    pub fn at(&self, name: &str) -> Init {
        Init { path: join(&self.path, name), ..self.clone() }
    }

    /// The same, but for linear layers, whose weights get this standard deviation instead of
    /// 1/√inputs: BERT's are all drawn with 0.02.
    pub fn with_linear_std(self, std: f64) -> Init {
        Init { linear_std: Some(std), ..self }
    }

    /// The standard deviation of the weight of a linear layer.
    pub(crate) fn linear_std(&self, inputs: usize) -> f64 {
        self.linear_std.unwrap_or(1.0 / (inputs.max(1) as f64).sqrt())
    }

    /// Normal with mean 0.
    pub fn normal(&self, name: &str, shape: impl IntoShape, std: f64) -> Result<Tensor> {
        self.random(name, shape, |word| std * random::normal(word))
    }

    /// Normal with mean 0, values beyond two standard deviations left out.
    pub fn truncated_normal(&self, name: &str, shape: impl IntoShape, std: f64) -> Result<Tensor> {
        // The quantiles between those of −2 and 2: Φ(−2) = 0.02275…
        let cut = (0.022_750_131_948_179_2 * 4_294_967_296.0) as u64;
        let span = (1 << 32) - 2 * cut;
        self.random(name, shape, |word| std * random::normal((cut + ((word as u64 * span) >> 32)) as u32))
    }

    /// Uniform between −bound and bound.
    pub fn uniform(&self, name: &str, shape: impl IntoShape, bound: f64) -> Result<Tensor> {
        self.random(name, shape, |word| bound * random::symmetric(word))
    }

    /// The same number everywhere.
    pub fn constant(&self, shape: impl IntoShape, value: f64) -> Result<Tensor> {
        match self.seed {
            Some(_) => Tensor::full(value, shape, DType::F32, &self.device),
            None => self.blank_tensor(shape),
        }
    }

    /// A key for other random numbers that belong to this name alone.
    pub(crate) fn key(&self, name: &str) -> u64 {
        random::mix(self.seed.unwrap_or(0), stream(&join(&self.path, name)))
    }

    fn random(&self, name: &str, shape: impl IntoShape, value: impl Fn(u32) -> f64 + Sync) -> Result<Tensor> {
        let Some(seed) = self.seed else { return self.blank_tensor(shape) };
        let shape = shape.into_shape()?;
        let stream = stream(&join(&self.path, name));
        let mut values = self.device.host().buffer::<f32>(shape.numel())?;
        parallel::chunks(&mut values, GRAIN, &|i, values| {
            let mut words = vec![0; values.len()];
            random::words(seed, stream, (i * GRAIN) as u64, &mut words);
            values.iter_mut().zip(words).for_each(|(x, word)| *x = value(word) as f32);
        });
        Tensor::from_buffer(values, shape, &self.device.on_host()).moved(&self.device)
    }

    fn blank_tensor(&self, shape: impl IntoShape) -> Result<Tensor> {
        Tensor::zeros([], DType::F32, &self.device)?.broadcast_to(shape)
    }
}

/// The number of a name's stream.
fn stream(name: &str) -> u64 {
    name.bytes().fold(name.len() as u64, |key, byte| random::mix(key, byte as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distributions() {
        let init = Init::seeded(3, &Device::cpu());
        let moments = |x: Tensor| {
            let x = x.to_vec::<f32>().unwrap();
            let largest = x.iter().fold(0f32, |m, x| m.max(x.abs()));
            let square = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
            (largest, square.sqrt())
        };
        let (largest, std) = moments(init.normal("n", [40_000], 0.5).unwrap());
        assert!(largest > 1.5 && (std - 0.5).abs() < 0.01, "{largest} {std}");
        // The standard deviation that is left between −2 and 2 is 0.87963.
        let (largest, std) = moments(init.truncated_normal("t", [40_000], 0.5).unwrap());
        assert!((0.99..=1.0).contains(&largest) && (std - 0.43981).abs() < 0.01, "{largest} {std}");
        let (largest, std) = moments(init.uniform("u", [40_000], 0.5).unwrap());
        assert!((0.49..0.5).contains(&largest) && (std - 0.28868).abs() < 0.01, "{largest} {std}");
    }

    #[test]
    fn names_and_seeds_tell_values_apart() {
        let at = |seed, name: &str| {
            Init::seeded(seed, &Device::cpu()).normal(name, [4], 1.0).unwrap().to_vec::<f32>().unwrap()
        };
        assert_eq!(at(1, "a.b"), at(1, "a.b"));
        assert_ne!(at(1, "a.b"), at(2, "a.b"));
        assert_ne!(at(1, "a.b"), at(1, "b.a"));
        assert_ne!(at(1, ""), at(1, "\0"));
    }

    #[test]
    fn blank_values_take_no_memory() {
        let device = Device::cpu();
        let init = Init::blank(&device);
        let x = [init.normal("x", [1000, 1000], 1.0).unwrap(), init.constant([1000], 1.0).unwrap()];
        assert_eq!(x[0].dims(), [1000, 1000]);
        assert!(device.memory().live_bytes < 100);
    }
}
