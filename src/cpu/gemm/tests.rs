use super::*;
use crate::device::Device;
use proptest::prelude::*;

pub(in crate::cpu) fn random(len: usize, seed: u64) -> Vec<f64> {
    let next = |i: usize| (i as u64 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    (0..len).map(|i| next(i + 1) as f64 / (1u64 << 23) as f64 - 1.0).collect()
}

pub(in crate::cpu) fn narrow(numbers: &[f64]) -> Vec<f32> {
    numbers.iter().map(|&x| x as f32).collect()
}

/// The slow twin.
pub(in crate::cpu) fn naive(alpha: f64, a: Mat<'_, f64>, b: Mat<'_, f64>, beta: f64, c: MatMut<'_, f64>) {
    for i in 0..c.rows {
        for j in 0..c.cols {
            let dot: f64 =
                (0..a.cols).map(|k| a.data[i * a.row + k * a.col] * b.data[k * b.row + j * b.col]).sum();
            let at = &mut c.data[i * c.row + j * c.col];
            *at = alpha * dot + if beta == 0.0 { 0.0 } else { beta * *at };
        }
    }
}

fn size() -> impl Strategy<Value = usize> {
    prop_oneof![0usize..20, Just(64), 100usize..300]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn equals_the_slow_twin(
        (m, n, k) in (size(), size(), size()),
        (ta, tb, tc) in any::<(bool, bool, bool)>(),
        pad in 0usize..3,
        beta in prop_oneof![Just(0.0), Just(1.0), Just(-0.5)],
        pool in any::<bool>(),
    ) {
        let mat = |rows: usize, cols: usize, t: bool| if t { (cols, rows) } else { (rows, cols) };
        let ((ar, ac), (br, bc), (cr, cc)) = (mat(m, k, ta), mat(k, n, tb), mat(m, n, tc));
        let (a, b) = (random(ar * (ac + pad), 1), random(br * (bc + pad), 2));
        let view = |data, rows, cols, t: bool| {
            let m = Mat { data, rows, cols, row: cols + pad, col: 1 };
            if t { m.t() } else { m }
        };
        fn out(data: &mut [f64], (rows, cols, pad, t): (usize, usize, usize, bool)) -> MatMut<'_, f64> {
            let m = MatMut { data, rows, cols, row: cols + pad, col: 1 };
            if t { m.t() } else { m }
        }
        let form = (cr, cc, pad, tc);
        let start = random(cr * (cc + pad), 3);
        let (mut want, mut got) = (start.clone(), start.clone());
        let (a, b) = (view(&a[..], ar, ac, ta), view(&b[..], br, bc, tb));
        let device = Device::cpu();
        let threads = if pool { Threads::Pool(device.host()) } else { Threads::One };
        naive(0.7, a, b, beta, out(&mut want, form));
        gemm(0.7, a, b, beta, out(&mut got, form), threads);
        for (g, w) in got.iter().zip(&want) {
            prop_assert!((g - w).abs() < 1e-12 * (k as f64 + 1.0), "{g} {w}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// In f32, each as it is chosen and as large products are computed.
    #[test]
    fn single_precision_equals_the_slow_twin(
        (m, n, k) in (size(), size(), 1usize..900),
        (ta, tb, bias) in any::<(bool, bool, bool)>(),
        pad in 0usize..3,
        beta in prop_oneof![Just(0.0), Just(1.0), Just(-0.5)],
    ) {
        let (m, n) = (m.max(1), n.max(1));
        let mat = |rows: usize, cols: usize, t: bool| if t { (cols, rows) } else { (rows, cols) };
        let ((ar, ac), (br, bc)) = (mat(m, k, ta), mat(k, n, tb));
        // Numbers that f32 holds exactly.
        let (a, b, row) = (random(ar * (ac + pad), 1), random(br * (bc + pad), 2), random(n, 4));
        let (a32, b32, row32) = (narrow(&a), narrow(&b), narrow(&row));
        fn view<T>(data: &[T], (rows, cols, pad, t): (usize, usize, usize, bool)) -> Mat<'_, T> {
            let m = Mat { data, rows, cols, row: cols + pad, col: 1 };
            if t { m.t() } else { m }
        }
        let (a_form, b_form) = ((ar, ac, pad, ta), (br, bc, pad, tb));
        let mut want = if bias { row.repeat(m) } else { random(m * n, 3) };
        let before = narrow(&want);
        let (beta, onto) = match bias {
            true => (1.0, Onto::Row(&row32[..])),
            false => (beta, Onto::Itself(beta as f32)),
        };
        naive(0.5, view(&a, a_form), view(&b, b_form), beta, MatMut::new(&mut want, m, n));
        let (a, b) = (view(&a32[..], a_form), view(&b32[..], b_form));
        let close = |got: &[f32]| {
            got.iter().zip(&want).all(|(&g, &w)| (g as f64 - w).abs() < 1e-5 * (1.0 + (k as f64).sqrt()))
        };
        let device = Device::cpu();
        for threads in [Threads::One, Threads::Pool(device.host())] {
            let mut got = if bias { vec![f32::NAN; m * n] } else { before.clone() };
            gemm_onto(0.5, a, b, onto, MatMut::new(&mut got, m, n), threads);
            prop_assert!(close(&got), "{threads:?}");
        }
        let mut got = if bias { vec![f32::NAN; m * n] } else { before };
        let out = Out { data: got.as_mut_ptr(), rows: m, cols: n, row: n, col: 1 };
        // SAFETY: three matrices within their slices, none of them empty.
        let own = unsafe { f32::own(Threads::Pool(device.host()), 0.5, a, b, onto, out) };
        prop_assert!(!own || close(&got), "as a large product");
    }
}

#[test]
fn single_precision_too() {
    let (m, n, k) = (70, 45, 130);
    let (a, b) = (random(m * k, 5), random(k * n, 6));
    let mut want = vec![0.0; m * n];
    naive(1.0, Mat::new(&a, m, k), Mat::new(&b, k, n), 0.0, MatMut::new(&mut want, m, n));
    let (a, b) = (narrow(&a), narrow(&b));
    let (mut got, mut got_lean) = (vec![f32::NAN; m * n], vec![f32::NAN; m * n]);
    let (device, c) = (Device::cpu(), MatMut::new(&mut got, m, n));
    gemm(1.0, Mat::new(&a, m, k), Mat::new(&b, k, n), 0.0, c, Threads::Pool(device.host()));
    let out = Out { data: got_lean.as_mut_ptr(), rows: m, cols: n, row: n, col: 1 };
    // SAFETY: three dense matrices of the sizes given.
    unsafe { f32::gemm(1.0, Mat::new(&a, m, k), Mat::new(&b, k, n), 0.0, out) };
    for ((g, l), w) in got.iter().zip(&got_lean).zip(&want) {
        assert!((*g as f64 - w).abs() < 1e-4 && (*l as f64 - w).abs() < 1e-4);
    }
}

#[test]
fn nothing_to_sum_leaves_beta_c() {
    let mut c = vec![2.0f32; 6];
    gemm(1.0, Mat::new(&[], 2, 0), Mat::new(&[], 0, 3), 0.5, MatMut::new(&mut c, 2, 3), Threads::One);
    assert_eq!(c, [1.0; 6]);
    let mut c = vec![f32::NAN; 6];
    gemm(1.0, Mat::new(&[], 2, 0), Mat::new(&[], 0, 3), 0.0, MatMut::new(&mut c, 2, 3), Threads::One);
    assert_eq!(c, [0.0; 6]);
}
