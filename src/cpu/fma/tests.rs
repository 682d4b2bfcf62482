use super::*;
use crate::cpu::gemm::MatMut;
use crate::cpu::gemm::tests::{naive, narrow, random};
use crate::device::Device;

/// As wide as AVX-512's kernel, for processors without it: what leads to it is the same.
fn twin() -> Kernel {
    #[target_feature(enable = "avx2,fma")]
    unsafe fn pack(b: Mat<'_, f32>, panel: &mut [f32]) {
        // SAFETY: the caller's.
        unsafe { avx2::pack_columns::<32>(b, panel) }
    }
    unsafe fn strip(alpha: f32, a: Left, b: Right, before: Before, c: Out<f32>) -> usize {
        let rows = [12, 8, 6, 4, 3, 2, 1].into_iter().find(|&rows| rows <= c.rows).unwrap();
        for (i, j) in (0..rows).flat_map(|i| (0..c.cols).map(move |j| (i, j))) {
            // SAFETY: what the kernel reads and writes.
            unsafe {
                let dot: f32 = (0..b.rows)
                    .map(|k| *a.data.add(i * a.row + k * a.col) * *b.data.add(k * b.row + j))
                    .sum();
                let kept =
                    if before.beta == 0.0 { 0.0 } else { before.beta * *before.data.add(i * before.row + j) };
                *c.data.add(i * c.row + j) = alpha * dot + kept;
            }
        }
        rows
    }
    Kernel { width: 32, copied: copied::<12>, pack, strip }
}

fn kernels() -> impl Iterator<Item = Kernel> {
    Kernel::all().chain(avx2::is_there().then(twin))
}

/// How a matrix lies in memory: by rows or by columns, its numbers `step` apart.
#[derive(Clone, Copy, Debug)]
struct Form {
    turned: bool,
    step: usize,
}

const ROWS_FIRST: Form = Form { turned: false, step: 1 };
const COLUMNS_FIRST: Form = Form { turned: true, step: 1 };
const APART: Form = Form { turned: false, step: 2 };

impl Form {
    /// The strides, with a gap after every row or column.
    fn strides(self, rows: usize, cols: usize) -> (usize, usize) {
        let long = if self.turned { rows } else { cols } * self.step + 3;
        if self.turned { (self.step, long) } else { (long, self.step) }
    }

    /// These numbers, row after row, as they lie.
    fn lay(self, numbers: &[f64], rows: usize, cols: usize) -> Vec<f32> {
        let (row, col) = self.strides(rows, cols);
        let mut data = vec![f32::NAN; (rows - 1) * row + (cols - 1) * col + 1];
        for (i, number) in numbers.iter().enumerate() {
            data[i / cols * row + i % cols * col] = *number as f32;
        }
        data
    }
}

/// c's numbers, row after row.
fn product(
    kernel: Kernel,
    (m, n, k): (usize, usize, usize),
    (a, b, start): (&[f64], &[f64], &[f64]),
    forms: [Form; 3],
    onto: Onto<'_, f32>,
    threads: Threads<'_>,
) -> Vec<f32> {
    let (left, right, mut result) = (forms[0].lay(a, m, k), forms[1].lay(b, k, n), forms[2].lay(start, m, n));
    let [(ar, ac), (br, bc), (cr, cc)] =
        [forms[0].strides(m, k), forms[1].strides(k, n), forms[2].strides(m, n)];
    let left = Mat { data: &left[..], rows: m, cols: k, row: ar, col: ac };
    let right = Mat { data: &right[..], rows: k, cols: n, row: br, col: bc };
    let c = Out { data: result.as_mut_ptr(), rows: m, cols: n, row: cr, col: cc };
    // SAFETY: the matrices are as large as their slices, and the processor has the kernel.
    assert!(unsafe { kernel.product(threads, 0.7, left, right, onto, c) });
    (0..m * n).map(|i| result[i / n * cr + i % n * cc]).collect()
}

/// Shapes with and without whole strips, panels and parts, of every way that a factor is read.
#[test]
fn every_kernel_equals_the_slow_twin() {
    let shapes = [
        (1, 1, 1),
        (1, 40, 77),
        (2, 301, 13),
        (3, 64, 40),
        (5, 64, 900),
        (7, 1, 800),
        (13, 704, 800),
        (20, 16, 50),
        (40, 64, 100),
        (46, 96, 450),
        (50, 33, 385),
        (97, 300, 17),
    ];
    let cpu = Device::cpu();
    for (kernel, shape) in kernels().flat_map(|kernel| shapes.map(|shape| (kernel, shape))) {
        let (m, n, k) = shape;
        // Numbers that f32 holds exactly.
        let (a, b, start, row) = (random(m * k, 1), random(k * n, 2), random(m * n, 3), random(n, 4));
        let row32 = narrow(&row);
        for beta in [Some(0.0), Some(-0.5), None] {
            let onto = beta.map_or(Onto::Row(&row32), |beta| Onto::Itself(beta as f32));
            let mut want = if beta.is_some() { start.clone() } else { row.repeat(m) };
            let (left, right) = (Mat::new(&a[..], m, k), Mat::new(&b[..], k, n));
            naive(0.7, left, right, beta.unwrap_or(1.0), MatMut::new(&mut want, m, n));
            let forms = [ROWS_FIRST, COLUMNS_FIRST, APART];
            for (left, right) in forms.into_iter().flat_map(|left| forms.map(|right| (left, right))) {
                // A row that c is put onto is for rows that lie one after another.
                let turned = (beta.is_some() && n > 1).then_some(COLUMNS_FIRST);
                for of_c in [Some(ROWS_FIRST), turned].into_iter().flatten() {
                    let run = |threads| {
                        product(kernel, shape, (&a, &b, &start), [left, right, of_c], onto, threads)
                    };
                    let got = run(Threads::One);
                    for (at, (&got, want)) in got.iter().zip(&want).enumerate() {
                        let apart = (got as f64 - want).abs();
                        assert!(
                            apart < 1e-6 * (k as f64).sqrt(),
                            "{shape:?} {left:?} {right:?} {of_c:?} {beta:?}, {at}: {got} {want}"
                        );
                    }
                    assert_eq!(got, run(Threads::Pool(cpu.host())), "{shape:?} {left:?} {right:?} {of_c:?}");
                }
            }
        }
    }
}

/// Rows of the right factor that are whole pages apart, which more than a few rows of the left one have packed.
#[test]
fn rows_of_whole_pages_give_the_same() {
    let (n, k) = (PAGE, 20);
    let (a, b) = (narrow(&random(FEW * k, 1)), narrow(&random(k * n, 2)));
    for (kernel, m) in kernels().flat_map(|kernel| [FEWER, FEW].map(|m| (kernel, m))) {
        let (a, b) = (Mat::new(&a[..m * k], m, k), Mat::new(&b[..], k, n));
        let mut c = vec![f32::NAN; m * n];
        let out = Out { data: c.as_mut_ptr(), rows: m, cols: n, row: n, col: 1 };
        // SAFETY: the matrices are as large as their slices, and the processor has the kernel.
        assert!(unsafe { kernel.product(Threads::One, 1.0, a, b, Onto::NOTHING, out) });
        for (at, &got) in c.iter().enumerate() {
            let terms = (0..k).map(|l| a.data[at / n * k + l] as f64 * b.data[l * n + at % n] as f64);
            let want: f64 = terms.sum();
            assert!((got as f64 - want).abs() < 1e-5, "{m} rows, {at}: {got} {want}");
        }
    }
}

/// A row of a and a column, or a row, of b that stand for all.
#[test]
fn strides_may_be_0() {
    let (m, n, k) = (20, 40, 50);
    let (x, y) = (narrow(&random(k, 1)), narrow(&random(k.max(n), 2)));
    let sum = |numbers: &[f32]| numbers.iter().map(|&x| x as f64).sum::<f64>();
    let dot: f64 = x.iter().zip(&y).map(|(&x, &y)| x as f64 * y as f64).sum();
    for (kernel, m) in kernels().flat_map(|kernel| [2, m].map(|m| (kernel, m))) {
        for (row, col) in [(1, 0), (0, 1)] {
            let a = Mat { data: &x[..], rows: m, cols: k, row: 0, col: 1 };
            let b = Mat { data: &y[..], rows: k, cols: n, row, col };
            let mut c = vec![f32::NAN; m * n];
            let out = Out { data: c.as_mut_ptr(), rows: m, cols: n, row: n, col: 1 };
            // SAFETY: the matrices are as large as their slices, and the processor has the kernel.
            assert!(unsafe { kernel.product(Threads::One, 1.0, a, b, Onto::NOTHING, out) });
            for (i, &got) in c.iter().enumerate() {
                let want = if col == 0 { dot } else { sum(&x) * y[i % n] as f64 };
                assert!((got as f64 - want).abs() < 1e-5, "{row} {col}: {got} {want}");
            }
        }
    }
}

/// Others are for a kernel that takes any.
#[test]
fn a_result_without_neighbours_is_left_alone() {
    let (a, mut c) = ([1.0; 4], [0.5; 8]);
    for (kernel, onto) in kernels().flat_map(|kernel| [(kernel, Onto::NOTHING), (kernel, Onto::Row(&a[..2]))])
    {
        let apart = matches!(onto, Onto::Itself(_)) as usize;
        let out = Out { data: c.as_mut_ptr(), rows: 2, cols: 2, row: 1 + 3 * apart, col: 2 };
        let a = Mat::new(&a, 2, 2);
        // SAFETY: as above.
        assert!(!unsafe { kernel.product(Threads::One, 1.0, a, a, onto, out) });
    }
    assert_eq!(c, [0.5; 8]);
}
