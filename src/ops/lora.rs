//! LoRA's layer as one operation: its update is added within the products, instead of by passes over the layer's
//! output and over the gradient of its input.

use crate::compute;
use crate::cpu::gemm::{Mat, MatMut, Onto};
use crate::cpu::{Float, dispatch};
use crate::error::{Error, Result};
use crate::grad::{Op, Saves, apply};
use crate::opencl;
use crate::ops::linear::{
    self, cl_affine, cl_product, frozen_backward, frozen_forward, has_cl_kernel, onto_bias, weight_gradient,
};
use crate::ops::matmul::view;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ.
///
/// x: … in, W: out×in, A: r×in, B: out×r, b: out, y: … out; the dimensions of x before the last count as one, t.
/// W is frozen. With h = s·x·Aᵀ (t×r) the update is h·Bᵀ, as of a linear layer with the weight B, so **dB = dyᵀ·h**
/// and dh = dy·B; with z = s·dy·B (t×r) that is **dA = zᵀ·x** and a second summand of **dx = dy·W + z·A**. And
/// **db = Σ_t dy_t**.
#[derive(Debug)]
struct Lora {
    scale: f64,
}

/// The places of the inputs.
const X: usize = 0;
const W: usize = 1;
const A: usize = 2;
const B: usize = 3;
const BIAS: usize = 4;

impl Op for Lora {
    fn name(&self) -> &'static str {
        "lora"
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let outputs = check(x)?;
        let shape = x[X].shape().with_dim(x[X].rank() - 1, outputs)?;
        let rows = compute::rows(x[X])?;
        let (y, h) = match x[X].is_on_opencl() {
            true => self.cl_forward(&rows, x)?,
            false => dispatch!("lora", rows.dtype(), T => self.host_forward::<T>(&rows, x))?,
        };
        Ok((compute::reshape(&y, shape)?, vec![h]))
    }

    fn vjp(
        &self,
        x: &[&Tensor],
        _: &Tensor,
        aux: &[Tensor],
        dy: &Tensor,
        need: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        if need[W] {
            let message = "a gradient was wanted for the frozen weight W; see `lora_linear`";
            return Err(Error::Frozen { op: "lora", message: message.into() });
        }
        let rows = compute::rows(dy)?;
        let mut gradients = match dy.is_on_opencl() {
            true => self.cl_vjp(x, &aux[0], &rows, need)?,
            false => dispatch!("lora", dy.dtype(), T => self.host_vjp::<T>(x, &aux[0], &rows, need))?,
        };
        if need.get(BIAS) == Some(&true) {
            gradients.push(Some(dy.clone()));
        }
        Ok(gradients)
    }

    fn saves(&self, need: &[bool]) -> Saves {
        let for_x = Saves::inputs(&[W, A]).when(need[X]);
        let for_z = Saves::inputs(&[B]).when(need[X] || need[A]);
        for_x.and(for_z).and(Saves::inputs(&[X]).when(need[A])).and(Saves::AUX.when(need[B]))
    }

    /// The weight may be narrow: it is widened as it is read.
    fn runs_on_opencl(&self, x: &[&Tensor]) -> bool {
        has_cl_kernel(x)
    }
}

impl Lora {
    /// y and h for rows of x.
    fn host_forward<T: Float>(&self, rows: &Tensor, x: &[&Tensor]) -> Result<(Tensor, Tensor)> {
        let host = rows.device().host();
        let [t, outputs, rank] = [rows, x[W], x[A]].map(|x| x.dims()[0]);
        let (tokens, a, b) = (view::<T>(rows)?, view::<T>(x[A])?, view::<T>(x[B])?);
        let bias = x.get(BIAS).map(|bias| compute::contiguous(bias)).transpose()?;
        let onto = onto_bias(bias.as_ref())?;
        let (mut h, mut y) = (host.buffer::<T>(t * rank)?, host.buffer::<T>(t * outputs)?);
        T::layer_gemm(host, T::ONE, tokens, a.t(), Onto::NOTHING, MatMut::new(&mut h, t, rank))?;
        self.times_scale(&mut h);
        frozen_forward(tokens, x[W], MatMut::new(&mut y, t, outputs), onto)?;
        let low = Mat::new(&h, t, rank);
        T::layer_gemm(host, T::ONE, low, b.t(), Onto::Itself(T::ONE), MatMut::new(&mut y, t, outputs))?;
        let tensor = |data, columns| -> Result<Tensor> {
            Ok(Tensor::from_buffer(data, Shape::new(&[t, columns])?, rows.device()))
        };
        Ok((tensor(y, outputs)?, tensor(h, rank)?))
    }

    /// The gradients of x, W, A and B for rows of dy.
    fn host_vjp<T: Float>(
        &self,
        x: &[&Tensor],
        h: &Tensor,
        dy: &Tensor,
        need: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let mut gradients = vec![None, None, None, None];
        if need[X] || need[A] {
            let z = self.host_z::<T>(dy, x[B])?;
            if need[X] {
                gradients[X] = Some(dx::<T>(x, dy, &z)?);
            }
            if need[A] {
                gradients[A] = Some(weight_gradient::<T>(&z, &compute::rows(x[X])?, x[A])?);
            }
        }
        if need[B] {
            gradients[B] = Some(weight_gradient::<T>(dy, h, x[B])?);
        }
        Ok(gradients)
    }

    /// z = s·dy·B.
    fn host_z<T: Float>(&self, dy: &Tensor, b: &Tensor) -> Result<Tensor> {
        let (host, t, rank) = (dy.device().host(), dy.dims()[0], b.dims()[1]);
        let mut z = host.buffer::<T>(t * rank)?;
        T::layer_gemm(host, T::ONE, view(dy)?, view(b)?, Onto::NOTHING, MatMut::new(&mut z, t, rank))?;
        self.times_scale(&mut z);
        Ok(Tensor::from_buffer(z, Shape::new(&[t, rank])?, dy.device()))
    }

    /// After the product: as a factor within it, it would be rounded once for each part of the sums.
    fn times_scale<T: Float>(&self, low: &mut [T]) {
        let scale = T::from_f64(self.scale);
        low.iter_mut().for_each(|low| *low = *low * scale);
    }

    fn cl_forward(&self, rows: &Tensor, x: &[&Tensor]) -> Result<(Tensor, Tensor)> {
        let h = cl_product(self.scale, rows, &compute::transpose(x[A])?)?;
        let y = cl_affine(rows, x[W], x.get(BIAS).copied())?;
        cl_add_product(&h, &compute::transpose(x[B])?, &y)?;
        Ok((y, h))
    }

    fn cl_vjp(&self, x: &[&Tensor], h: &Tensor, dy: &Tensor, need: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let mut gradients = vec![None, None, None, None];
        if need[X] || need[A] {
            let z = cl_product(self.scale, dy, x[B])?;
            if need[X] {
                let dx = cl_product(1.0, dy, x[W])?;
                cl_add_product(&z, x[A], &dx)?;
                gradients[X] = Some(compute::reshape(&dx, *x[X].shape())?);
            }
            if need[A] {
                gradients[A] = Some(cl_product(1.0, &compute::transpose(&z)?, &compute::rows(x[X])?)?);
            }
        }
        if need[B] {
            gradients[B] = Some(cl_product(1.0, &compute::transpose(dy)?, h)?);
        }
        Ok(gradients)
    }
}

/// y += a·b on an OpenCL device.
fn cl_add_product(a: &Tensor, b: &Tensor, y: &Tensor) -> Result<()> {
    opencl::gemm::gemm(1.0, a.cl()?, (b.cl()?, b.dtype()), 1.0, (y.cl()?.data, y.layout()))
}

/// dy·W + z·A, in the shape of x.
fn dx<T: Float>(x: &[&Tensor], dy: &Tensor, z: &Tensor) -> Result<Tensor> {
    let (host, t, inputs) = (dy.device().host(), dy.dims()[0], x[W].dims()[1]);
    let mut dx = host.buffer::<T>(t * inputs)?;
    frozen_backward(view(dy)?, x[W], MatMut::new(&mut dx, t, inputs), T::ZERO)?;
    let to = MatMut::new(&mut dx, t, inputs);
    T::layer_gemm(host, T::ONE, view(z)?, view(x[A])?, Onto::Itself(T::ONE), to)?;
    Ok(Tensor::from_buffer(dx, *x[X].shape(), dy.device()))
}

/// The number of outputs, if all fits together.
fn check(x: &[&Tensor]) -> Result<usize> {
    let outputs = linear::check("lora", x[X], x[W], x.get(BIAS).copied())?;
    let inputs = x[W].dims()[1];
    for other in [x[A], x[B]] {
        compute::same_dtype("lora", x[X], other)?;
    }
    match (x[A].dims(), x[B].dims()) {
        (&[r, i], &[o, q]) if (i, o, q) == (inputs, outputs, r) => Ok(outputs),
        _ => {
            let message = format!(
                "A is {} and B {} where the weight {} wants (r, {inputs}) and ({outputs}, r)",
                x[A].shape(),
                x[B].shape(),
                x[W].shape()
            );
            Err(Error::shape("lora", message))
        }
    }
}

/// A linear layer with LoRA (Hu et al., 2021), y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ: x (…, in), the frozen weight W
/// (out, in), which may be stored as bf16 or f16, the bias b (out), A (r, in) and B (out, r) give (…, out).
///
/// The same as two linear layers more and a sum, without the passes over y and dx that those need.
///
/// ```
/// use randlora::{Device, Tensor, lora_linear};
///
/// let device = Device::cpu();
/// let x = Tensor::from_vec(vec![1f32, 2.0], [1, 2], &device)?;
/// let weight = Tensor::from_vec(vec![1f32, 0.0, 0.0, 1.0], [2, 2], &device)?;
/// let a = Tensor::from_vec(vec![1f32, 1.0], [1, 2], &device)?.track();
/// let b = Tensor::from_vec(vec![0f32, 1.0], [2, 1], &device)?.track();
/// let y = lora_linear(&x, &weight, None, [&a, &b], 2.0)?;
/// assert_eq!(y.to_vec::<f32>()?, [1.0, 8.0]);
/// let gradients = y.sum_all()?.backward()?;
/// assert_eq!(gradients.of(&a)?.to_vec::<f32>()?, [2.0, 4.0]);
/// assert_eq!(gradients.of(&b)?.to_vec::<f32>()?, [6.0, 6.0]);
/// # Ok::<(), randlora::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`] where the sizes do not fit, [`Error::DType`] where the types differ (but for a bf16 or f16 weight),
/// [`Error::Frozen`] where the weight is tracked.
pub fn lora_linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    [a, b]: [&Tensor; 2],
    scale: f64,
) -> Result<Tensor> {
    if weight.is_tracked() {
        let message = "its weight stays frozen: to train that too, add `x.linear(a, None)?.linear(b, None)?` to \
                       what `x.linear(weight, bias)?` gives";
        return Err(Error::Frozen { op: "lora", message: message.into() });
    }
    let op = Lora { scale };
    match bias {
        Some(bias) => apply(op, &[x, weight, a, b, bias]),
        None => apply(op, &[x, weight, a, b]),
    }
}

#[cfg(test)]
pub(crate) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::DType;
    use crate::cpu::naive::Naive;
    use crate::ops::cases::Case;
    use crate::ops::linear::{as_naive, stored};
    let naive = |scale: f64, x: &[Naive]| {
        let (w, a, b) = (&x[W], &x[A], &x[B]);
        let mut dims = x[X].dims.clone();
        *dims.last_mut().expect("at least one dimension") = w.dims[0];
        Naive::build(&dims, |i| {
            let (&o, outer) = i.split_last().expect("at least one dimension");
            let dot = |row: &dyn Fn(usize) -> f64| -> f64 {
                (0..w.dims[1]).map(|k| x[X].at(&[outer, &[k]].concat()) * row(k)).sum()
            };
            let low: f64 = (0..a.dims[0]).map(|r| dot(&|k| a.at(&[r, k])) * b.at(&[o, r])).sum();
            dot(&|k| w.at(&[o, k])) + scale * low + x.get(BIAS).map_or(0.0, |bias| bias.at(&[o]))
        })
    };
    let run = |scale| move |x: &[&Tensor]| lora_linear(x[X], x[W], x.get(BIAS).copied(), [x[A], x[B]], scale);
    let frozen =
        |name, inputs, scale| Case::new(name, inputs, run(scale), move |x| naive(scale, x)).frozen(W);
    let narrow = |name, dtype| {
        let run = move |x: &[&Tensor]| {
            let weight = stored(5, x[0].dims()[1], dtype).to_device(x[0].device())?;
            lora_linear(x[0], &weight, Some(x[3]), [x[1], x[2]], 0.5)
        };
        Case::new(name, &["t n", "r n", "5 r", "5"], run, move |x| {
            let w = as_naive(&stored(5, x[0].dims[1], dtype));
            naive(0.5, &[x[0].clone(), w, x[1].clone(), x[2].clone(), x[3].clone()])
        })
    };
    vec![
        narrow("lora, bf16 weight", DType::BF16),
        narrow("lora, f16 weight", DType::F16),
        frozen("lora", &["a b n", "m n", "r n", "m r", "m"], 1.5),
        frozen("lora, no bias", &["a n", "m n", "r n", "m r"], -0.5),
        frozen("lora, one vector", &["n", "m n", "r n", "m r", "m"], 1.0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Device};

    fn made(dims: &[usize], seed: u64, dtype: DType) -> Result<Tensor> {
        let mut words = vec![0; dims.iter().product()];
        crate::random::words(seed, 0, 0, &mut words);
        let values = words.into_iter().map(crate::random::symmetric).collect();
        Tensor::from_vec::<f64>(values, dims, &Device::cpu())?.to_dtype(dtype)
    }

    /// The bits of the same layer made of linear layers and a sum, for every stored type of the weight, with sums
    /// that go by parts.
    #[test]
    fn the_same_bits_as_its_parts() -> Result<()> {
        let (t, inputs, outputs, rank) = (70, 800, 900, 8);
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let dims = [[t, inputs], [outputs, inputs], [rank, inputs], [outputs, rank], [1, outputs]];
            let [x, w, a, b, bias] = [0, 1, 2, 3, 4].map(|i| made(&dims[i], i as u64, DType::F32));
            let (x, a, b, bias) = (x?.track(), a?.track(), b?.track(), bias?.reshape([outputs])?.track());
            let (w, dy) = (w?.to_dtype(dtype)?, made(&[t, outputs], 9, DType::F32)?);
            let bits = |y: Tensor| -> Result<Vec<Vec<f32>>> {
                let gradients = y.backward_from(&dy)?;
                let all = [&x, &a, &b, &bias].map(|x| gradients.of(x)?.to_vec());
                [y.to_vec()].into_iter().chain(all).collect()
            };
            let low = x.linear(&a, None)?.scale(0.7)?.linear(&b, None)?;
            let parts = x.linear(&w, Some(&bias))?.add(&low)?;
            assert_eq!(bits(lora_linear(&x, &w, Some(&bias), [&a, &b], 0.7)?)?, bits(parts)?, "{dtype}");
        }
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_an_error() -> Result<()> {
        let [x, w, a, b] = [[2, 3], [4, 3], [2, 3], [4, 2]].map(|dims| made(&dims, 0, DType::F32));
        let (x, w, a, b) = (x?, w?, a?, b?);
        let shape = |ab| matches!(lora_linear(&x, &w, None, ab, 1.0), Err(Error::Shape { .. }));
        assert!(shape([&b, &a]) && shape([&a, &w]) && shape([&w, &b]) && !shape([&a, &b]));
        let half = a.to_dtype(DType::BF16)?;
        assert!(matches!(lora_linear(&x, &w, None, [&half, &b], 1.0), Err(Error::DType { .. })));
        assert!(matches!(lora_linear(&x, &w.track(), None, [&a, &b], 1.0), Err(Error::Frozen { .. })));
        Ok(())
    }
}
