//! The random matrices that the layers of a model share, and what is where in them.

use std::sync::{Arc, OnceLock};

use super::cl::ClBases;
use super::plan::Sizes;
use crate::compute;
use crate::cpu::gemm::Mat;
use crate::cpu::ternary::Ternary;
use crate::cpu::{Float, dispatch};
use crate::device::Device;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::shape::Shape;
use crate::tensor::Tensor;

/// Which row of the scaled A meets which column of B.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// Column q of B is rank q mod r of basis ⌊q/r⌋ and meets the row of A and λ of that rank and
    /// the γ of that basis: the formula as written.
    Paper,
    /// Column q of B, counted in the same way, meets rank ⌊q/n⌋ and basis q mod n. What the
    /// authors' code and Hugging Face PEFT compute: the same family of updates with the columns of
    /// B in another order, but another ΔW for the same numbers.
    Peft,
}

/// Which rows of B a basis has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Structure {
    /// All of them: the paper's bases.
    #[default]
    Dense,
    /// Every row belongs to one basis, row d to basis ⌊d/r⌋ mod n; in the others it is zero.
    ///
    /// Ours, beyond the paper. A legal choice of random bases with as many trained numbers and full
    /// rank, for a layer's first m rows have min(r, rows) of each basis, which add up to m. The entries
    /// are √n times those of dense bases, so that the entries of ΔW have the same variance. B
    /// is n times smaller and ΔW n times cheaper to build. Blocks of r rows, taken by the bases in
    /// turn, so that layers of one smaller side and several larger ones share one B: the rows of
    /// the smaller layer are the first ones of the larger layer.
    Block,
}

/// What there is of B in memory, which decides what products with it cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// Every entry.
    Dense,
    /// The entries of one basis in every row: [`Structure::Block`].
    Block,
    /// Of bases of −v, 0 and v with few entries that are not 0, where these are.
    Ternary {
        /// The share of the entries that are not 0.
        share: f64,
    },
}

impl From<Structure> for Form {
    fn from(structure: Structure) -> Form {
        match structure {
            Structure::Dense => Form::Dense,
            Structure::Block => Form::Block,
        }
    }
}

/// The share of entries other than 0 up to which ternary bases are stored by their places: where products
/// with them are clearly cheaper than dense ones (see `cpu::ternary`). Very sparse bases are below it from
/// 100 columns on, sparse ones (1/3) and signs are not.
const FEW: f64 = 0.2;

/// B as it is stored.
#[derive(Clone, Debug)]
enum Stored {
    Dense(Tensor),
    Block(Tensor),
    Ternary {
        places: Arc<Ternary>,
        /// v.
        value: f64,
    },
}

/// A layer's part of B.
#[derive(Clone, Copy, Debug)]
pub(super) enum B<'a, T> {
    Whole(Whole<'a, T>),
    /// D×r.
    Block(Mat<'a, T>),
}

/// A layer's part of a B of which every row belongs to all bases.
#[derive(Clone, Copy, Debug)]
pub(super) enum Whole<'a, T> {
    /// D×c.
    Dense(Mat<'a, T>),
    /// B/v, of which the layer's part is the first D×c.
    Ternary(&'a Ternary),
}

/// The random matrices that all layers of a model share: A (r×M) and B, of which a layer with
/// smaller side m, larger side d and n = ⌈m/r⌉ bases uses A[:, :m] and B[:d, :n, :] of dense bases
/// (D×N×r) or B[:d, :] of block bases (D×r).
#[derive(Clone, Debug)]
pub struct Bases {
    a: Tensor,
    b: Stored,
    b_shape: Shape,
    pairing: Pairing,
    /// The n of the factor √n that block bases were made with.
    made_for: usize,
    /// Both on the OpenCL device that they were last used on. All else is done with them in host memory.
    on_device: OnceLock<ClBases>,
}

impl Bases {
    /// Dense bases with these matrices: A of shape (r, M), B of shape (D, N, r), both f32 or both
    /// f64. A B of −v, 0 and v with few that are not 0, as of very sparse bases, is stored by their places:
    /// n times smaller and products with it cheaper ([`Form::Ternary`]).
    pub fn new(a: &Tensor, b: &Tensor, pairing: Pairing) -> Result<Bases> {
        let (&[rank, _], &[_, _, b_rank]) = (a.dims(), b.dims()) else {
            let message = format!("A is {}, not (r, M), or B is {}, not (D, N, r)", a.shape(), b.shape());
            return Err(Error::shape("bases", message));
        };
        Bases::checked(a, b, (rank, b_rank), Structure::Dense, pairing, 1)
    }

    /// Block bases with these matrices: A of shape (r, M), B of shape (D, r), both f32 or both f64, with
    /// the factor √n for layers with `n` bases; layers with another number m get √(m/n) on top.
    /// Their columns are paired as in the paper; saving puts them where PEFT wants them.
    pub fn block(a: &Tensor, b: &Tensor, n: usize) -> Result<Bases> {
        let (&[rank, _], &[_, b_rank]) = (a.dims(), b.dims()) else {
            let message = format!("A is {}, not (r, M), or B is {}, not (D, r)", a.shape(), b.shape());
            return Err(Error::shape("bases", message));
        };
        Bases::checked(a, b, (rank, b_rank), Structure::Block, Pairing::Paper, n.max(1))
    }

    fn checked(
        a: &Tensor,
        b: &Tensor,
        (rank, b_rank): (usize, usize),
        structure: Structure,
        pairing: Pairing,
        made_for: usize,
    ) -> Result<Bases> {
        if rank != b_rank || rank == 0 {
            return Err(Error::shape(
                "bases",
                format!("A has rank {rank} and B {b_rank}: they must agree and not be 0"),
            ));
        }
        if !compute::same_dtype("bases", a, b)?.is_compute() {
            return Err(Error::dtype(
                "bases",
                format!("{} only stores: cast with `to_dtype(DType::F32)`", a.dtype()),
            ));
        }
        let (a, b_shape) = (compute::contiguous(&a.on_host()?)?, *b.shape());
        let b = compute::contiguous(&b.on_host()?)?;
        let b = match structure {
            Structure::Block => Stored::Block(b),
            Structure::Dense => dispatch!("bases", b.dtype(), T => Stored::of::<T>(b))?,
        };
        Ok(Bases { a, b, b_shape, pairing, made_for, on_device: OnceLock::new() })
    }

    /// r: the rank of one basis.
    pub fn rank(&self) -> usize {
        self.a.dims()[0]
    }

    /// A, of shape (r, M).
    pub fn a(&self) -> &Tensor {
        &self.a
    }

    /// B, of shape (D, N, r), or (D, r) of block bases. One that is stored by places is written out.
    pub fn b(&self) -> Result<Tensor> {
        match &self.b {
            Stored::Dense(b) | Stored::Block(b) => Ok(b.clone()),
            Stored::Ternary { places, value } => dispatch!("bases", self.a.dtype(), T => {
                let mut b = self.a.device().host().buffer::<T>(self.b_shape.numel())?;
                places.write_out(T::from_f64(*value), self.b_shape[1] * self.b_shape[2], &mut b);
                Ok(Tensor::from_buffer(b, self.b_shape, self.a.device()))
            }),
        }
    }

    /// The shape of B.
    pub fn b_shape(&self) -> &Shape {
        &self.b_shape
    }

    /// The memory that both take as they are stored.
    pub fn bytes(&self) -> usize {
        let of = |x: &Tensor| x.numel() * x.dtype().size();
        of(&self.a)
            + match &self.b {
                Stored::Dense(b) | Stored::Block(b) => of(b),
                Stored::Ternary { places, .. } => places.bytes(),
            }
    }

    /// Which rows of B a basis has.
    pub fn structure(&self) -> Structure {
        if let Stored::Block(_) = self.b { Structure::Block } else { Structure::Dense }
    }

    /// What there is of B in memory.
    pub fn form(&self) -> Form {
        match &self.b {
            Stored::Dense(_) => Form::Dense,
            Stored::Block(_) => Form::Block,
            Stored::Ternary { places, .. } => {
                Form::Ternary { share: places.count() as f64 / self.b_shape.numel() as f64 }
            }
        }
    }

    /// The same where a device computes with them: OpenCL devices multiply with all entries, and have ternary ones
    /// in two bits each, unpacked as they are read.
    pub fn form_on(&self, device: &Device) -> Form {
        match self.form() {
            Form::Ternary { .. } if device.runtime().is_some() => Form::Dense,
            form => form,
        }
    }

    /// Which row of the scaled A meets which column of B.
    pub fn pairing(&self) -> Pairing {
        self.pairing
    }

    /// The same bases in another type. f32 to f64 is exact.
    pub fn to_dtype(&self, dtype: DType) -> Result<Bases> {
        let b = match &self.b {
            Stored::Dense(b) => Stored::Dense(b.to_dtype(dtype)?),
            Stored::Block(b) => Stored::Block(b.to_dtype(dtype)?),
            Stored::Ternary { places, value } => {
                let value = dispatch!("bases", dtype, T => Ok(T::from_f64(*value).to_f64()))?;
                Stored::Ternary { places: places.clone(), value }
            }
        };
        let (a, on_device) = (self.a.to_dtype(dtype)?, OnceLock::new());
        Ok(Bases { a, b, on_device, ..*self })
    }

    /// A and B on an OpenCL device. They are moved once, whatever the number of layers that share them.
    pub(super) fn on_device(&self, device: &Device) -> Result<ClBases> {
        if let Some(moved) = self.on_device.get()
            && moved.a.device().is(device)
        {
            return Ok(moved.clone());
        }
        let moved = ClBases::of(self, device)?;
        // Of two that come at once, or of two devices, the first one's stay.
        let _ = self.on_device.set(moved.clone());
        Ok(moved)
    }

    /// What the entries of B, as it is stored, are multiplied by in a layer with `n` bases.
    pub(super) fn factor(&self, n: usize) -> f64 {
        match self.b {
            Stored::Ternary { value, .. } => value,
            _ => self.factor_of_b(n),
        }
    }

    /// What the entries of [`Bases::b`] are multiplied by in a layer with `n` bases.
    pub(super) fn factor_of_b(&self, n: usize) -> f64 {
        match self.b {
            Stored::Block(_) => (n as f64 / self.made_for as f64).sqrt(),
            Stored::Dense(_) | Stored::Ternary { .. } => 1.0,
        }
    }

    /// These bases with the zeros of block bases written out, for layers with `n` bases: what PEFT
    /// computes with them is what these compute. Dense bases are returned as they are.
    ///
    /// PEFT pairs column q of B with rank ⌊q/n⌋ and basis q mod n, so the k-th column of basis i goes
    /// to q = k·n + i.
    ///
    /// # Errors
    /// [`Error::Shape`] for sizes beyond memory.
    pub fn dense(&self, n: usize) -> Result<Bases> {
        let Stored::Block(b) = &self.b else { return Ok(self.clone()) };
        let b = dispatch!("bases", b.dtype(), T => self.written_out::<T>(b, n))?;
        Bases::new(&self.a, &b, Pairing::Peft)
    }

    /// This B of block bases as (D, n, r).
    fn written_out<T: Float>(&self, b: &Tensor, n: usize) -> Result<Tensor> {
        let rank = self.rank();
        let shape = Shape::new(&[b.dims()[0], n, rank])?;
        let mut dense = b.device().host().buffer::<T>(shape.numel())?;
        dense.fill(T::ZERO);
        let factor = T::from_f64(self.factor(n));
        let rows = b.elements::<T>()?.chunks(rank).zip(dense.chunks_mut((n * rank).max(1)));
        for (d, (row, dense)) in rows.enumerate() {
            let places = dense.iter_mut().skip(d / rank % n.max(1)).step_by(n.max(1));
            places.zip(row).for_each(|(place, &entry)| *place = factor * entry);
        }
        Ok(Tensor::from_buffer(dense, shape, b.device()))
    }

    /// The reverse of [`Bases::dense`]: the block bases of which that makes these, if there are any.
    pub(crate) fn blocks(&self, n: usize) -> Result<Option<Bases>> {
        dispatch!("bases", self.a.dtype(), T => self.blocks_of::<T>(&self.b()?, n))
    }

    fn blocks_of<T: Float>(&self, b: &Tensor, n: usize) -> Result<Option<Bases>> {
        let &[large, bases, rank] = b.dims() else { return Ok(None) };
        if n < 2 || n > bases || self.pairing != Pairing::Peft {
            return Ok(None);
        }
        let mut blocks = Vec::with_capacity(large * rank);
        for (d, row) in b.elements::<T>()?.chunks(bases * rank).enumerate() {
            for (q, &entry) in row.iter().enumerate() {
                if q < n * rank && q % n == d / rank % n {
                    blocks.push(entry);
                } else if entry != T::ZERO {
                    return Ok(None);
                }
            }
        }
        let b = Tensor::from_vec(blocks, [large, rank], b.device())?;
        Bases::block(&self.a, &b, n).map(Some)
    }

    /// An error where a layer is larger than the bases.
    pub(crate) fn check(&self, sizes: Sizes) -> Result<()> {
        let b = self.b_shape.dims();
        let enough = self.structure() == Structure::Block || sizes.bases() <= b[1];
        if sizes.small() <= self.a.dims()[1] && sizes.large() <= b[0] && enough {
            return Ok(());
        }
        let message = format!(
            "the layer ({} × {}) is larger than the bases, A {} and B {}: make them from all layers' sizes",
            sizes.outputs,
            sizes.inputs,
            self.a.shape(),
            self.b_shape
        );
        Err(Error::shape("randlora", message))
    }

    /// A layer's parts of A (r×m) and B.
    pub(super) fn layer<T: Float>(&self, sizes: Sizes) -> Result<(Mat<'_, T>, B<'_, T>)> {
        self.check(sizes)?;
        let (rank, dims) = (self.rank(), self.b_shape.dims());
        let a = Mat::new(self.a.elements::<T>()?, rank, self.a.dims()[1]).columns(0, sizes.small());
        let rows = |b, width| Mat::new(b, dims[0], width).rows(0, sizes.large());
        let b = match &self.b {
            Stored::Dense(b) => {
                let b = rows(b.elements::<T>()?, dims[1] * rank).columns(0, sizes.columns());
                B::Whole(Whole::Dense(b))
            }
            Stored::Block(b) => B::Block(rows(b.elements::<T>()?, rank)),
            Stored::Ternary { places, .. } => B::Whole(Whole::Ternary(places)),
        };
        Ok((a, b))
    }
}

impl Stored {
    /// Dense bases in the form that is cheapest for their entries.
    fn of<T: Float>(b: Tensor) -> Result<Stored> {
        let columns = b.dims()[1..].iter().product();
        let ternary = Ternary::of::<T>(b.device().host(), b.elements()?, columns, FEW)?;
        Ok(match ternary {
            Some((places, value)) => Stored::Ternary { places: Arc::new(places), value: value.to_f64() },
            None => Stored::Dense(b),
        })
    }
}
