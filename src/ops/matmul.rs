//! Products of matrices, in batches.

use crate::compute;
use crate::cpu::gemm::{Mat, MatMut, Threads, gemm};
use crate::cpu::{Float, dispatch, parallel};
use crate::error::{Error, Result};
use crate::grad::{Op, Saves, apply};
use crate::opencl::{self, View};
use crate::shape::{Layout, Shape};
use crate::tensor::Tensor;

/// y = a·b for the matrices in the last two dimensions, the dimensions before them broadcast.
///
/// a: … m×k, b: … k×n, y: … m×n.
/// From y_ij = Σ_l a_il·b_lj: da_il = Σ_j dy_ij·b_lj, so **da = dy·bᵀ**, and **db = aᵀ·dy**.
#[derive(Debug)]
struct Matmul;

impl Op for Matmul {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        Ok((product(x[0], x[1])?, vec![]))
    }

    fn vjp(
        &self,
        x: &[&Tensor],
        _: &Tensor,
        _: &[Tensor],
        dy: &Tensor,
        need: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let (a, b) = (x[0], x[1]);
        let da = || product(dy, &compute::transpose(b)?);
        let db = || {
            if b.rank() == 2 && a.rank() > 2 {
                // One sum over all batches instead of one product for each and a sum after.
                return product(&compute::transpose(&compute::rows(a)?)?, &compute::rows(dy)?);
            }
            product(&compute::transpose(a)?, dy)
        };
        Ok(vec![need[0].then(da).transpose()?, need[1].then(db).transpose()?])
    }

    fn saves(&self, need: &[bool]) -> Saves {
        Saves::inputs(&[1]).when(need[0]).and(Saves::inputs(&[0]).when(need[1]))
    }

    fn runs_on_opencl(&self, x: &[&Tensor]) -> bool {
        compute::all_f32(x)
    }
}

/// a·b, untracked.
pub(crate) fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let dtype = compute::same_dtype("matmul", a, b)?;
    if a.rank() < 2 || b.rank() < 2 {
        let message =
            format!("{} and {}: matrices have two dimensions; use `unsqueeze`", a.shape(), b.shape());
        return Err(Error::shape("matmul", message));
    }
    let (m, k) = (a.dims()[a.rank() - 2], a.dims()[a.rank() - 1]);
    let (k2, n) = (b.dims()[b.rank() - 2], b.dims()[b.rank() - 1]);
    if k != k2 {
        let hint = if k == n { "; did you mean b.t()?" } else { "" };
        let message = format!("inner sizes differ: {} × {} ({k} against {k2}){hint}", a.shape(), b.shape());
        return Err(Error::shape("matmul", message));
    }
    dispatch!("matmul", dtype, T => {
        if b.rank() == 2 && a.rank() > 2 {
            // One matrix for all batches: their rows make one tall matrix.
            let rows = compute::rows(a)?;
            let y = batched::<T>(&rows, b, Shape::scalar(), rows.dims()[0], n)?;
            return compute::reshape(&y, a.shape().with_dim(a.rank() - 1, n)?);
        }
        let batch = Shape::new(&a.dims()[..a.rank() - 2])?.broadcast(&Shape::new(&b.dims()[..b.rank() - 2])?, "matmul")?;
        batched::<T>(a, b, batch, m, n)
    })
}

fn batched<T: Float>(a: &Tensor, b: &Tensor, batch: Shape, m: usize, n: usize) -> Result<Tensor> {
    let shape = |rows: usize, cols: usize| Shape::new(&[batch.dims(), &[rows, cols]].concat());
    let k = a.dims()[a.rank() - 1];
    let a_layout = a.layout().broadcast_to(&shape(m, k)?, "matmul")?;
    let b_layout = b.layout().broadcast_to(&shape(k, n)?, "matmul")?;
    let shape = shape(m, n)?;
    if a.is_on_opencl() {
        let out = opencl::floats(a.cl()?.data.runtime(), shape.numel())?;
        let (a_view, b_view) = (View { layout: &a_layout, ..a.cl()? }, View { layout: &b_layout, ..b.cl()? });
        let to = Layout::contiguous(shape);
        opencl::gemm::gemm(1.0, a_view, (b_view, b.dtype()), 0.0, (&out, &to))?;
        return Ok(Tensor::from_cl(out, a.dtype(), shape, a.device()));
    }
    let mut out = a.device().host().buffer::<T>(shape.numel())?;
    if shape.numel() == 0 {
        return Ok(Tensor::from_buffer(out, shape, a.device()));
    }
    let (a_data, b_data) = (a.host::<T>()?, b.host::<T>()?);
    let (a_starts, b_starts) = (starts(&a_layout), starts(&b_layout));
    let pool = Threads::Pool(a.device().host());
    let one = |i: usize, out: &mut [T], threads| {
        let a = matrix(a_data, &a_layout, a_starts[i]);
        let b = matrix(b_data, &b_layout, b_starts[i]);
        gemm(T::ONE, a, b, T::ZERO, MatMut::new(out, m, n), threads);
    };
    {
        // Many products run beside each other, few large ones share the threads. Either way the
        // order of each sum is the same.
        if batch.numel() > 1 && m * n * k < 1 << 22 {
            parallel::rows(&mut out, m * n, m * n + m * n * k / 64, &|first, out| {
                out.chunks_mut(m * n).enumerate().for_each(|(i, out)| one(first + i, out, Threads::One));
            });
        } else {
            out.chunks_mut(m * n).enumerate().for_each(|(i, out)| one(i, out, pool));
        }
    }
    Ok(Tensor::from_buffer(out, shape, a.device()))
}

/// Where each matrix of a batch starts.
fn starts(layout: &Layout) -> Vec<usize> {
    let rank = layout.shape().rank() - 2;
    let mut starts = vec![layout.offset()];
    for (&size, &stride) in layout.shape()[..rank].iter().zip(layout.strides()) {
        starts = starts.iter().flat_map(|&s| (0..size).map(move |i| s + i * stride)).collect();
    }
    starts
}

/// The matrix in the last two dimensions that starts at `start`.
pub(crate) fn matrix<'a, T>(data: &'a [T], layout: &Layout, start: usize) -> Mat<'a, T> {
    let rank = layout.shape().rank();
    let (rows, cols) = (layout.shape()[rank - 2], layout.shape()[rank - 1]);
    let data = if rows * cols == 0 { &[] } else { &data[start..] };
    Mat { data, rows, cols, row: layout.strides()[rank - 2], col: layout.strides()[rank - 1] }
}

/// The matrix that a tensor of two dimensions is.
pub(crate) fn view<T: Float>(x: &Tensor) -> Result<Mat<'_, T>> {
    Ok(matrix(x.host()?, x.layout(), x.layout().offset()))
}

impl Tensor {
    /// The product of the matrices in the last two dimensions: (…, m, k)·(…, k, n) = (…, m, n), the
    /// dimensions before them broadcast. Any strides: a transposed view costs nothing.
    ///
    /// ```
    /// # use randlora::{Device, Tensor};
    /// # let device = Device::cpu();
    /// let a = Tensor::from_vec(vec![1f32, 2.0, 3.0, 4.0], [2, 2], &device)?;
    /// assert_eq!(a.matmul(&a.t()?)?.to_vec::<f32>()?, [5.0, 11.0, 11.0, 25.0]);
    /// let error = a.matmul(&Tensor::from_vec(vec![1f32; 3], [3, 1], &device)?).unwrap_err();
    /// assert_eq!(error.to_string(), "matmul: inner sizes differ: [2, 2] × [3, 1] (2 against 3)");
    /// # Ok::<(), randlora::Error>(())
    /// ```
    pub fn matmul(&self, other: &Tensor) -> Result<Tensor> {
        apply(Matmul, &[self, other])
    }
}

#[cfg(test)]
pub(crate) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::cpu::naive::Naive;
    use crate::ops::cases::Case;
    let naive = |x: &[Naive]| {
        let (a, b) = (&x[0], &x[1]);
        let (ra, rb) = (a.dims.len(), b.dims.len());
        let (m, k, n) = (a.dims[ra - 2], a.dims[ra - 1], b.dims[rb - 1]);
        let outer = |n: &Naive| Naive::build(&n.dims[..n.dims.len() - 2], |_| 0.0);
        let mut dims = outer(a).zip(&outer(b), |_, _| 0.0).dims;
        let batch = dims.len();
        dims.extend([m, n]);
        Naive::build(&dims, |i| {
            let (row, col) = (i[batch], i[batch + 1]);
            (0..k)
                .map(|l| a.at(&[&i[..batch], &[row, l]].concat()) * b.at(&[&i[..batch], &[l, col]].concat()))
                .sum()
        })
    };
    let run = |x: &[&Tensor]| x[0].matmul(x[1]);
    vec![
        Case::new("matmul", &["m k", "k n"], run, naive),
        Case::new("matmul, batches", &["a b m k", "a b k n"], run, naive),
        Case::new("matmul, one right factor", &["a b m k", "k n"], run, naive),
        Case::new("matmul, one left factor", &["m k", "a k n"], run, naive),
        Case::new("matmul, broadcast batches", &["a 1 m k", "b k n"], run, naive),
        Case::new(
            "matmul, transposed",
            &["a m k", "a n k"],
            |x| x[0].matmul(&x[1].t()?),
            move |x| {
                let b = &x[1];
                naive(&[
                    x[0].clone(),
                    Naive::build(&[b.dims[0], b.dims[2], b.dims[1]], |i| b.at(&[i[0], i[2], i[1]])),
                ])
            },
        ),
    ]
}
