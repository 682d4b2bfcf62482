//! Products in f32 on x86-64, by the calling thread or shared by those of the pool.
//!
//! For c = a·b the right factor is packed, into panels as wide as a few registers, that all threads
//! read; the left one is read where it lies, or a block at a time is copied into the thread's cache where
//! the numbers of a row do not lie one after another (dyᵀ·x). A thread takes 48 rows of c at a time, for which a
//! block of a stays in its cache, and walks the panels. The innermost loop holds a strip of c in registers, of 6 × 16
//! elements with AVX2 and 12 × 32 with AVX-512, and reads a number of a for each of its rows and one row of the
//! panel: close to the processor's peak. What would be read too seldom to make up for the packing or copying is read
//! as it lies, and one or two rows of c are dot products where that suits the right factor ([`dots`]).
//!
//! An element of c is the same sum in the same order, which follows from shape and strides, whoever computes it and
//! whatever is copied for it: the result has the same bits on any number of threads.
//!
//! Inner loops are written without closures: one that passes through a function of `core` is inlined by
//! link-time optimisation or not at all.

mod avx2;
mod avx512;
mod dots;

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;

use crate::cpu::gemm::{Mat, Onto, Out, Threads};
use crate::cpu::parallel;
use crate::cpu::simd::prefetch_row;

/// Rows of c that a thread takes at a time: a multiple of every kernel's strip.
const ROWS: usize = 48;
/// Terms that are summed in registers before they are added to c, at most: a panel of so many rows stays
/// in the cache.
const DEPTH: usize = 384;
/// Elements that are packed for the pool at a time, at most, but for a rounded width: 2 MiB.
const PACKED: usize = 1 << 19;
/// Elements that a thread packs for itself at a time, likewise: half of a second cache of 512 KiB.
const PACKED_ALONE: usize = 1 << 16;
/// Columns of a piece of c, at least.
const NARROW: usize = 128;
/// Rows of c for which a right factor whose rows lie one after another is read as it lies, at most: packing it would
/// cost more than it saves.
const FEW: usize = ROWS;
/// The same where its rows are a multiple of [`PAGE`] apart: few lines of the caches are there for them all.
const FEWER: usize = 16;
/// Numbers in a page of memory.
const PAGE: usize = 1024;
/// Elements of such a factor that it is read as it lies for any number of rows, at most: it stays in the first cache.
const NEAR: usize = 8192;
/// Panels for which a left factor is read as it lies, at most, though the numbers of its rows are far apart.
const REREAD: usize = 2;
/// Rows that lie far apart are asked for so many before they are read: the processor does not guess them.
const AHEAD: usize = 16;
/// Terms of a sum, at most, with which a strip is done before the rows of the next could come from memory: those after
/// the next are asked for.
const SHORT: usize = 64;
/// Pieces of a product for each thread, at least: for one that comes late, or has a slower core. More would copy
/// the left factor once more for each.
const PIECES: usize = 4;

/// Numbers in a line of the cache, with which panels begin.
const LINE: usize = 16;

/// What the inner loops read a row of c from before they add to it: `beta` times this. Where beta is 0, it is not
/// read.
#[derive(Clone, Copy)]
struct Before {
    data: *const f32,
    row: usize,
    beta: f32,
}

/// Rows of the left factor: element (i, j) at `data + i·row + j·col`.
#[derive(Clone, Copy)]
struct Left {
    data: *const f32,
    row: usize,
    col: usize,
}

/// At most [`ROWS`] rows of the left factor, in strips of so many: element (i, j) of the nth at
/// `data + n·next + i·row + j·col`.
#[derive(Clone, Copy)]
struct Strips {
    first: Left,
    rows: usize,
    next: usize,
}

/// Rows of the right factor, a panel or as it lies: row i begins at `data + i·row`.
#[derive(Clone, Copy)]
struct Right {
    data: *const f32,
    rows: usize,
    row: usize,
}

/// What depends on the processor's registers.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    /// Columns of c that are held in registers: a row of a panel.
    width: usize,
    /// [`copied`] in strips of as many rows of c as are held in registers.
    copied: fn(a: Mat<'_, f32>, to: &mut Copied) -> Strips,
    /// Writes the columns of b, at most `width`, as a panel: a row of it holds a row of b, and zeros after it.
    pack: unsafe fn(b: Mat<'_, f32>, panel: &mut [f32]),
    /// c ← alpha·a·b + before for the first rows of c, which has at most `width` columns: as many as it holds
    /// in registers. How many these were. Rows of b are read in their whole width.
    strip: unsafe fn(alpha: f32, a: Left, b: Right, before: Before, c: Out<f32>) -> usize,
}

impl Kernel {
    /// Those that this processor has what they need for, the fastest first.
    fn all() -> impl Iterator<Item = Kernel> {
        let kernels = [(avx512::KERNEL, avx512::is_there()), (avx2::KERNEL, avx2::is_there())];
        kernels.into_iter().filter(|(_, is_there)| *is_there).map(|(kernel, _)| kernel)
    }

    /// The fastest, if there is one.
    pub(super) fn fastest() -> Option<Kernel> {
        Kernel::all().next()
    }

    /// c ← alpha·a·b + what it is put onto, if the strides of c suit; whether they did.
    ///
    /// # Safety
    /// Every element that the strides reach must lie in its slice or matrix, the elements of c must be
    /// distinct and nobody else's, and no dimension may be 0. The processor must have what the kernel needs.
    pub(super) unsafe fn product(
        self,
        threads: Threads<'_>,
        alpha: f32,
        a: Mat<'_, f32>,
        b: Mat<'_, f32>,
        onto: Onto<'_, f32>,
        c: Out<f32>,
    ) -> bool {
        // Where columns of c lie one after another instead of rows, cᵀ = bᵀ·aᵀ; so too for a single column.
        let column = c.cols == 1 && c.row == 1;
        let turned = (c.col != 1 || column) && matches!(onto, Onto::Itself(_));
        let (a, b, c) = if turned { (b.t(), a.t(), c.t()) } else { (a, b, c) };
        if c.col != 1 {
            return false;
        }
        let product = Product { kernel: self, alpha, a, b, onto, c };
        let shared = matches!(threads, Threads::Pool(_));
        // SAFETY: the caller's; every kernel's processor has AVX2 and FMA.
        unsafe {
            if dots::fit(&product) {
                dots::product(product, shared);
            } else if product.is_read_as_it_lies() {
                Panels { kernel: self, depth: depth(b.rows), b, packed: None, shared }
                    .product(alpha, a, onto, c);
            } else {
                product.packed(threads);
            }
        }
        true
    }
}

/// c ← alpha·a·b + what it is put onto. The numbers of a row of c lie one after another.
#[derive(Clone, Copy)]
struct Product<'a> {
    kernel: Kernel,
    alpha: f32,
    a: Mat<'a, f32>,
    b: Mat<'a, f32>,
    onto: Onto<'a, f32>,
    c: Out<f32>,
}

/// The part of a right factor that is packed at a time: `deep` rows, in panels of `depth` rows, of `columns` columns.
struct Part {
    depth: usize,
    deep: usize,
    columns: usize,
}

impl Part {
    /// The numbers that it takes to pack it, from wherever they begin to a line of the cache and on.
    fn memory(&self) -> usize {
        self.deep * self.columns + LINE
    }
}

/// The rows of a panel, of a right factor with so many.
fn depth(k: usize) -> usize {
    k.div_ceil(k.div_ceil(DEPTH))
}

thread_local! {
    /// What a thread packs into for itself: up to 300 KiB, for as long as it lives. Nobody else's work is taken up
    /// while it is in use.
    static ALONE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Product<'_> {
    /// Whether packing the right factor would cost more than it saves. Its rows are then whole panels' rows.
    fn is_read_as_it_lies(&self) -> bool {
        let Product { kernel, b, c, .. } = self;
        let few = if b.row.is_multiple_of(PAGE) { FEWER } else { FEW };
        b.col == 1 && b.cols.is_multiple_of(kernel.width) && (c.rows <= few || b.rows * b.cols <= NEAR)
    }

    /// The product with the right factor packed, in the pool's memory or, if that has none, in the thread's.
    ///
    /// # Safety
    /// That of [`Kernel::product`].
    unsafe fn packed(&self, threads: Threads<'_>) {
        let part = self.part(PACKED);
        let pool = match threads {
            // As much for every product, so that one that is done leaves the next what it asks for.
            Threads::Pool(device) => device.buffer::<f32>(part.memory().max(PACKED + LINE)).ok(),
            Threads::One => None,
        };
        match pool {
            // SAFETY: the caller's.
            Some(mut memory) => unsafe { self.by_parts(&part, &mut memory, true) },
            None => ALONE.with_borrow_mut(|memory| {
                let part = self.part(PACKED_ALONE);
                memory.resize(part.memory().max(memory.len()), 0.0);
                // SAFETY: the caller's.
                unsafe { self.by_parts(&part, memory, false) }
            }),
        }
    }

    /// Parts of the right factor of about `packed` elements. The sums do not depend on it: panels are as deep.
    fn part(&self, packed: usize) -> Part {
        let (n, k) = (self.b.cols, self.b.rows);
        let depth = depth(k);
        let columns = n.div_ceil(n.div_ceil(packed / depth)).next_multiple_of(self.kernel.width);
        let deep = (packed / columns / depth).clamp(1, k.div_ceil(depth)) * depth;
        Part { depth, deep, columns }
    }

    /// The product by parts of the right factor, packed into `memory`; `shared` by the pool or not.
    ///
    /// # Safety
    /// That of [`Kernel::product`].
    unsafe fn by_parts(&self, part: &Part, memory: &mut [f32], shared: bool) {
        let &Product { kernel, alpha, a, b, onto, c } = self;
        let depth = part.depth;
        let first = memory.as_ptr().align_offset(4 * LINE).min(LINE);
        let memory = &mut memory[first..];
        for start in (0..a.cols).step_by(part.deep) {
            let deep = part.deep.min(a.cols - start);
            let (a, b) = (a.columns(start, deep), b.rows(start, deep));
            let onto = if start == 0 { onto } else { Onto::Itself(1.0) };
            for from in (0..c.cols).step_by(part.columns) {
                let width = part.columns.min(c.cols - from);
                let (b, onto) = (b.columns(from, width), onto.columns(from..from + width));
                // SAFETY: the caller's, and the processor has what the kernel needs.
                unsafe {
                    let packed = Some(pack(kernel, b, depth, memory, shared));
                    let panels = Panels { kernel, depth, b, packed, shared };
                    panels.product(alpha, a, onto, c.tile(0, from, c.rows, width));
                }
            }
        }
    }
}

/// Packs b into the start of `memory`: all panels of the first `depth` rows, then those of the next.
///
/// # Safety
/// The processor must have what the kernel needs.
unsafe fn pack<'a>(
    kernel: Kernel,
    b: Mat<'_, f32>,
    depth: usize,
    memory: &'a mut [f32],
    shared: bool,
) -> &'a [f32] {
    let (wide, across) = (kernel.width, b.cols.div_ceil(kernel.width));
    let memory = &mut memory[..b.rows.div_ceil(depth) * across * wide * depth];
    let pack = |i: usize, panel: &mut [f32]| {
        let (start, first) = (i / across * depth, i % across * wide);
        let b = b.rows(start, depth.min(b.rows - start)).columns(first, wide.min(b.cols - first));
        // SAFETY: the caller's.
        unsafe { (kernel.pack)(b, &mut panel[..b.rows * wide]) }
    };
    match shared {
        true => parallel::chunks(memory, wide * depth, &pack),
        false => memory.chunks_mut(wide * depth).enumerate().for_each(|(i, panel)| pack(i, panel)),
    }
    memory
}

/// A right factor, or a part of it, in panels of a kernel's width and at most `depth` rows.
struct Panels<'a> {
    kernel: Kernel,
    depth: usize,
    b: Mat<'a, f32>,
    /// As [`pack`] wrote it; or it is read as it lies, where its width is that of whole panels.
    packed: Option<&'a [f32]>,
    /// Whether the threads of the pool take part.
    shared: bool,
}

impl Panels<'_> {
    /// The panel of these rows of b that begins with this column. All that is read of it is there.
    fn panel(&self, rows: Range<usize>, column: usize) -> Right {
        let wide = self.kernel.width;
        let (data, row) = match self.packed {
            Some(data) => {
                (&data[rows.start * self.b.cols.next_multiple_of(wide) + column * self.depth..], wide)
            }
            None => (&self.b.data[rows.start * self.b.row + column..], self.b.row),
        };
        let data = &data[..(rows.len() - 1) * row + wide];
        Right { data: data.as_ptr(), rows: rows.len(), row }
    }

    /// c ← alpha·a·panels + what it is put onto, in pieces that threads can share out.
    ///
    /// # Safety
    /// That of [`Kernel::product`].
    unsafe fn product(&self, alpha: f32, a: Mat<'_, f32>, onto: Onto<'_, f32>, c: Out<f32>) {
        let down = c.rows.div_ceil(ROWS);
        // By threads, unlike all else that is split: an element's sum does not depend on it.
        let columns = match self.shared {
            true => c.cols.div_ceil((PIECES * rayon::current_num_threads()).div_ceil(down)).max(NARROW),
            false => c.cols,
        };
        let columns = columns.next_multiple_of(self.kernel.width);
        let across = c.cols.div_ceil(columns);
        parallel::run(down * across, if self.shared { 1 } else { usize::MAX }, &|i| {
            let (i, j) = (i / across * ROWS, i % across * columns);
            let (height, width) = (ROWS.min(c.rows - i), columns.min(c.cols - j));
            // SAFETY: the caller's; no other piece has these elements of c.
            unsafe { self.piece(alpha, a.rows(i, height), onto, c.tile(i, 0, height, c.cols), j..j + width) }
        });
    }

    /// [`Panels::product`] for at most [`ROWS`] rows and these columns.
    ///
    /// # Safety
    /// That of [`Panels::product`].
    unsafe fn piece(
        &self,
        alpha: f32,
        a: Mat<'_, f32>,
        onto: Onto<'_, f32>,
        c: Out<f32>,
        columns: Range<usize>,
    ) {
        let wide = self.kernel.width;
        let mut copy: Copied = [const { MaybeUninit::uninit() }; ROWS * DEPTH];
        for start in (0..a.cols).step_by(self.depth) {
            let a = a.columns(start, self.depth.min(a.cols - start));
            let left = match a.col != 1 && columns.len() > REREAD * wide {
                true => (self.kernel.copied)(a, &mut copy),
                false => Strips {
                    first: Left { data: a.data.as_ptr(), row: a.row, col: a.col },
                    rows: ROWS,
                    next: 0,
                },
            };
            // Once: for the panels after the first the rows are in the cache.
            let far = a.cols <= SHORT && a.col == 1;
            for column in columns.clone().step_by(wide) {
                let panel = self.panel(start..start + a.cols, column);
                // SAFETY: these elements of c are among those that the caller vouches for.
                let c = unsafe { c.tile(0, column, c.rows, wide.min(columns.end - column)) };
                let itself = |beta| Before { data: c.data.cast_const(), row: c.row, beta };
                let before = match onto {
                    Onto::Row(row) if start == 0 => {
                        Before { data: row[column..].as_ptr(), row: 0, beta: 1.0 }
                    }
                    Onto::Itself(beta) if start == 0 => itself(beta),
                    _ => itself(1.0),
                };
                // SAFETY: as above, and as many rows of a and of what c is put onto; the panel is whole.
                unsafe { self.strips(alpha, left, panel, before, c, far && column == columns.start) }
            }
        }
    }

    /// c ← alpha·a·panel + before, strip by strip; `ahead` if rows of a that come later are to be asked for.
    ///
    /// # Safety
    /// As many rows of a as long as the panel, and of `before` as wide as c, must be there, and the panel's rows in
    /// the kernel's width; the processor must have what the kernel needs.
    unsafe fn strips(&self, alpha: f32, a: Strips, panel: Right, before: Before, c: Out<f32>, ahead: bool) {
        let mut row = 0;
        while row < c.rows {
            // SAFETY: what is left of the caller's rows.
            unsafe {
                let a = Left {
                    data: a.first.data.add(row / a.rows * a.next + row % a.rows * a.first.row),
                    ..a.first
                };
                let before = Before { data: before.data.add(row * before.row), ..before };
                let done = (self.kernel.strip)(alpha, a, panel, before, c.tile(row, 0, c.rows - row, c.cols));
                if ahead {
                    for i in 2 * done..3 * done {
                        prefetch_row(a.data.wrapping_add(i * a.row), panel.rows);
                    }
                }
                row += done;
            }
        }
    }
}

/// What strips of [`ROWS`] × [`DEPTH`] are copied to.
type Copied = [MaybeUninit<f32>; ROWS * DEPTH];

/// At most [`ROWS`] rows and [`DEPTH`] columns in strips of R rows, column after column: the inner loop reads them
/// from one end to the other.
fn copied<const R: usize>(a: Mat<'_, f32>, to: &mut Copied) -> Strips {
    const { assert!(ROWS.is_multiple_of(R), "the last strip would not fit") };
    let next = R * a.cols;
    for j in 0..a.cols {
        let column = &a.data[j * a.col..];
        if a.row == 1 {
            prefetch_row(column.as_ptr().wrapping_add(AHEAD * a.col), a.rows);
        }
        // By R numbers, which the compiler moves as vectors.
        let (whole, _) = column[..if a.row == 1 { a.rows } else { 0 }].as_chunks::<R>();
        for (strip, from) in whole.iter().enumerate() {
            to[strip * next + j * R..][..R].copy_from_slice(&from.map(MaybeUninit::new));
        }
        for i in whole.len() * R..a.rows {
            to[i / R * next + j * R + i % R].write(column[i * a.row]);
        }
    }
    Strips { first: Left { data: to.as_ptr().cast(), row: 1, col: R }, rows: R, next }
}

#[cfg(test)]
mod tests;
