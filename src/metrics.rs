//! How good predictions are: agreement of classes, and correlation of numbers.
//!
//! Where a formula divides nothing by nothing the results are those of scikit-learn, and a
//! correlation that is not defined is `None`. No predictions at all are an error.

use std::collections::BTreeMap;

use crate::error::{Error, Result};

/// The share of predictions that equal their label.
///
/// ```
/// use randlora::metrics;
///
/// let (predictions, labels) = ([0, 1, 1, 0], [0, 1, 0, 0]);
/// assert_eq!(metrics::accuracy(&predictions, &labels)?, 0.75);
/// assert_eq!(metrics::f1(&predictions, &labels)?, 2.0 / 3.0);
/// # Ok::<(), randlora::Error>(())
/// ```
///
/// # Errors
/// [`Error::Data`] where the slices are empty or of different lengths.
pub fn accuracy(predictions: &[usize], labels: &[usize]) -> Result<f64> {
    same_length("accuracy", predictions.len(), labels.len())?;
    let right = predictions.iter().zip(labels).filter(|(p, l)| p == l).count();
    Ok(right as f64 / labels.len() as f64)
}

/// F1 of class 1, the harmonic mean of precision and recall: 2·TP / (2·TP + FP + FN), and 0 where
/// class 1 is neither predicted nor a label. Every other class counts as negative.
///
/// # Errors
/// [`Error::Data`] where the slices are empty or of different lengths.
pub fn f1(predictions: &[usize], labels: &[usize]) -> Result<f64> {
    let counts = count("F1", predictions, labels)?;
    Ok(counts.get(&1).map_or(0.0, Count::f1))
}

/// The unweighted mean of F1 over all classes that are predicted or are a label.
///
/// # Errors
/// [`Error::Data`] where the slices are empty or of different lengths.
pub fn macro_f1(predictions: &[usize], labels: &[usize]) -> Result<f64> {
    let counts = count("macro F1", predictions, labels)?;
    Ok(counts.values().map(Count::f1).sum::<f64>() / counts.len() as f64)
}

/// Matthews correlation, for any number of classes (Gorodkin's R_K): with `c` right predictions out
/// of `s`, class k predicted p_k times and a label t_k times,
///
/// > (c·s − Σ p_k·t_k) / √((s² − Σ p_k²)·(s² − Σ t_k²)),
///
/// and 0 where either side has a single class. For two classes this is
/// (TP·TN − FP·FN) / √((TP+FP)(TP+FN)(TN+FP)(TN+FN)).
///
/// # Errors
/// [`Error::Data`] where the slices are empty or of different lengths.
pub fn matthews(predictions: &[usize], labels: &[usize]) -> Result<f64> {
    let counts = count("Matthews correlation", predictions, labels)?;
    // In whole numbers: the differences are exact however close the terms.
    let sum = |of: fn(&Count) -> i128| counts.values().map(of).sum::<i128>();
    let all = labels.len() as i128;
    let both = sum(|k| k.right) * all - sum(|k| k.predicted * k.actual);
    let predicted = all * all - sum(|k| k.predicted * k.predicted);
    let actual = all * all - sum(|k| k.actual * k.actual);
    if predicted == 0 || actual == 0 {
        return Ok(0.0);
    }
    Ok((both as f64 / ((predicted as f64).sqrt() * (actual as f64).sqrt())).clamp(-1.0, 1.0))
}

/// Pearson's correlation Σ(x−x̄)(y−ȳ) / √(Σ(x−x̄)²·Σ(y−ȳ)²), or `None` where one side is constant
/// (a single pair is).
///
/// # Errors
/// [`Error::Data`] where the slices are empty, of different lengths, or hold a NaN or infinity.
pub fn pearson(x: &[f64], y: &[f64]) -> Result<Option<f64>> {
    finite("Pearson correlation", x, y)?;
    Ok(correlation(x, y))
}

/// Spearman's correlation: Pearson's of the ranks, equal values sharing the mean of their ranks.
/// `None` where one side is constant.
///
/// # Errors
/// [`Error::Data`] where the slices are empty, of different lengths, or hold a NaN or infinity.
pub fn spearman(x: &[f64], y: &[f64]) -> Result<Option<f64>> {
    finite("Spearman correlation", x, y)?;
    Ok(correlation(&ranks(x), &ranks(y)))
}

/// F1 over all decisions of a multi-label task taken together, 2·TP / (2·TP + FP + FN), and 0 where
/// nothing is predicted and nothing is a label. Both slices hold examples × classes, in any order.
///
/// # Errors
/// [`Error::Data`] where the slices are empty or of different lengths.
pub fn micro_f1(predictions: &[bool], labels: &[bool]) -> Result<f64> {
    same_length("micro F1", predictions.len(), labels.len())?;
    let mut count = Count::default();
    for (&predicted, &actual) in predictions.iter().zip(labels) {
        count.predicted += i128::from(predicted);
        count.actual += i128::from(actual);
        count.right += i128::from(predicted && actual);
    }
    Ok(count.f1())
}

/// The share of examples of a multi-label task with all decisions right. Both slices hold the
/// `classes` decisions of the first example, then those of the second, and so on.
///
/// # Errors
/// [`Error::Data`] where the slices are empty, of different lengths, or not full rows of `classes`.
pub fn subset_accuracy(predictions: &[bool], labels: &[bool], classes: usize) -> Result<f64> {
    let what = "subset accuracy";
    same_length(what, predictions.len(), labels.len())?;
    if !labels.len().is_multiple_of(classes) {
        return Err(Error::data(
            what,
            format!("{} decisions are not rows of {classes} classes", labels.len()),
        ));
    }
    let rows = labels.chunks_exact(classes);
    let right = predictions.chunks_exact(classes).zip(rows).filter(|(p, l)| p == l).count();
    Ok(right as f64 / (labels.len() / classes) as f64)
}

/// How often a class was predicted, was the label, and was both.
#[derive(Default)]
struct Count {
    predicted: i128,
    actual: i128,
    right: i128,
}

impl Count {
    fn f1(&self) -> f64 {
        match self.predicted + self.actual {
            0 => 0.0,
            both => 2.0 * self.right as f64 / both as f64,
        }
    }
}

fn count(what: &str, predictions: &[usize], labels: &[usize]) -> Result<BTreeMap<usize, Count>> {
    same_length(what, predictions.len(), labels.len())?;
    let mut counts = BTreeMap::<usize, Count>::new();
    for (&predicted, &actual) in predictions.iter().zip(labels) {
        counts.entry(predicted).or_default().predicted += 1;
        let count = counts.entry(actual).or_default();
        count.actual += 1;
        count.right += i128::from(predicted == actual);
    }
    Ok(counts)
}

fn same_length(what: &str, left: usize, right: usize) -> Result<()> {
    if left != right {
        return Err(Error::data(what, format!("the two slices hold {left} and {right} values: pair them")));
    }
    if left == 0 {
        return Err(Error::data(what, "nothing to compare: give at least one example"));
    }
    Ok(())
}

fn finite(what: &str, x: &[f64], y: &[f64]) -> Result<()> {
    same_length(what, x.len(), y.len())?;
    match x.iter().zip(y).position(|(x, y)| !x.is_finite() || !y.is_finite()) {
        Some(i) => Err(Error::data(what, format!("pair {i}, ({}, {}), is not finite", x[i], y[i]))),
        None => Ok(()),
    }
}

fn correlation(x: &[f64], y: &[f64]) -> Option<f64> {
    let (x, y) = (direction(x)?, direction(y)?);
    Some(x.iter().zip(&y).map(|(x, y)| x * y).sum::<f64>().clamp(-1.0, 1.0))
}

/// The deviations from the mean, at length 1; `None` for a constant, which has none.
fn direction(x: &[f64]) -> Option<Vec<f64>> {
    // Asked of the values: the deviations of a constant can be off zero by rounding.
    if x.iter().all(|v| *v == x[0]) {
        return None;
    }
    // Within -1 and 1 neither the sum nor a square can overflow.
    let largest = x.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
    let scaled: Vec<f64> = x.iter().map(|v| v / largest).collect();
    let mean = scaled.iter().sum::<f64>() / x.len() as f64;
    let deviations: Vec<f64> = scaled.iter().map(|v| v - mean).collect();
    let length = deviations.iter().map(|d| d * d).sum::<f64>().sqrt();
    (length > 0.0).then(|| deviations.iter().map(|d| d / length).collect())
}

/// The place of each value in ascending order, counted from 1; equal values get their mean place.
fn ranks(x: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&a, &b| x[a].total_cmp(&x[b]));
    let mut ranks = vec![0.0; x.len()];
    let mut before = 0;
    for tied in order.chunk_by(|&a, &b| x[a] == x[b]) {
        let mean = before as f64 + (tied.len() + 1) as f64 / 2.0;
        tied.iter().for_each(|&i| ranks[i] = mean);
        before += tied.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected numbers of this module are scikit-learn 1.9's and SciPy 1.17's.
    #[track_caller]
    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-14, "{found} against {expected}");
    }

    const PREDICTIONS: [usize; 10] = [1, 0, 1, 1, 0, 0, 1, 0, 1, 1];
    const LABELS: [usize; 10] = [1, 0, 0, 1, 0, 1, 1, 0, 0, 1];

    #[test]
    fn two_classes() {
        close(accuracy(&PREDICTIONS, &LABELS).unwrap(), 0.7);
        close(f1(&PREDICTIONS, &LABELS).unwrap(), 0.7272727272727273);
        close(macro_f1(&PREDICTIONS, &LABELS).unwrap(), 0.696969696969697);
        close(matthews(&PREDICTIONS, &LABELS).unwrap(), 0.408248290463863);
        close(matthews(&[1, 0], &[0, 1]).unwrap(), -1.0);
    }

    #[test]
    fn more_classes_some_only_predicted() {
        let predictions = [0, 1, 2, 2, 1, 0, 2, 1, 3, 0, 2, 4];
        let labels = [0, 1, 2, 1, 1, 2, 2, 0, 3, 0, 2, 2];
        close(accuracy(&predictions, &labels).unwrap(), 0.6666666666666666);
        close(macro_f1(&predictions, &labels).unwrap(), 0.6);
        close(matthews(&predictions, &labels).unwrap(), 0.5484827557301445);
    }

    #[test]
    fn a_single_class() {
        close(matthews(&[1, 1, 1], &[0, 1, 1]).unwrap(), 0.0);
        close(matthews(&[0, 1, 1], &[1, 1, 1]).unwrap(), 0.0);
        close(matthews(&[1, 1], &[1, 1]).unwrap(), 0.0);
        close(f1(&[0, 0, 0], &[0, 0, 0]).unwrap(), 0.0);
        close(macro_f1(&[0, 0], &[0, 0]).unwrap(), 1.0);
    }

    #[test]
    fn correlations() {
        let x = [0.1, 4.75, 2.5, 2.5, 3.2, -1.0, 2.5, 0.1];
        let y = [0.0, 5.0, 2.0, 3.0, 3.0, 0.5, 2.0, 0.5];
        close(pearson(&x, &y).unwrap().unwrap(), 0.9417190099043444);
        close(spearman(&x, &y).unwrap().unwrap(), 0.9063208090792971);
        let far = x.map(|v| v * 3e307);
        close(pearson(&far, &y).unwrap().unwrap(), 0.9417190099043444);
        assert_eq!(spearman(&[1.0, 2.0, 9.0], &[-1.0, -1.5, -7.0]).unwrap(), Some(-1.0));
        assert_eq!(ranks(&[3.0, 0.0, 3.0, -0.0, 7.0]), [3.5, 1.5, 3.5, 1.5, 5.0]);
    }

    #[test]
    fn a_constant_correlates_with_nothing() {
        // Their mean is not exactly 0.1.
        let constant = [0.1; 3];
        let y = [1.0, 2.0, 4.0];
        for correlation in [pearson, spearman] {
            assert_eq!(correlation(&constant, &y).unwrap(), None);
            assert_eq!(correlation(&y, &constant).unwrap(), None);
            assert_eq!(correlation(&[1.0], &[2.0]).unwrap(), None);
        }
    }

    #[test]
    fn several_labels() {
        let predictions = [1, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1].map(|v| v == 1);
        let labels = [1, 0, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0].map(|v| v == 1);
        close(micro_f1(&predictions, &labels).unwrap(), 0.7692307692307693);
        close(micro_f1(&[false; 3], &[false; 3]).unwrap(), 0.0);
        close(subset_accuracy(&predictions, &labels, 3).unwrap(), 0.5);
    }

    #[test]
    fn what_cannot_be_compared() {
        for metric in [accuracy, f1, macro_f1, matthews] {
            assert!(metric(&[], &[]).unwrap_err().to_string().contains("nothing to compare"));
            let error = metric(&[1], &[1, 0]).unwrap_err().to_string();
            assert!(error.ends_with("the two slices hold 1 and 2 values: pair them"), "{error}");
        }
        for correlation in [pearson, spearman] {
            assert!(correlation(&[], &[]).is_err());
            assert!(correlation(&[1.0], &[1.0, 2.0]).is_err());
            let error = correlation(&[1.0, f64::NAN], &[1.0, 2.0]).unwrap_err().to_string();
            assert!(error.contains("pair 1, (NaN, 2), is not finite"), "{error}");
            assert!(correlation(&[1.0, 2.0], &[f64::INFINITY, 2.0]).is_err());
        }
        assert!(micro_f1(&[], &[]).is_err());
        assert!(micro_f1(&[true], &[true, false]).is_err());
        assert!(subset_accuracy(&[true], &[true, false], 1).is_err());
        for classes in [0, 2] {
            let error = subset_accuracy(&[true; 3], &[true; 3], classes).unwrap_err().to_string();
            assert!(error.contains(&format!("3 decisions are not rows of {classes} classes")), "{error}");
        }
    }
}
