//! What a study has found: a table, and a picture for each task.

use std::path::{Path, PathBuf};

use randlora::io::write_whole;
use serde_json::Value;

use super::entry::Entry;
use super::task::Task;
use super::{Known, Study};
use crate::cli::Failure;
use crate::cli::numbers::{mean, spread};
use crate::cli::plot::{Axis, Curve, draw};

/// The numbers of a field.
fn numbers(results: &[Value], field: &str) -> Vec<f64> {
    results.iter().filter_map(|result| result[field].as_f64()).collect()
}

/// The rate whose held-out score is best, over the trainings that have ended; the first of several. None
/// before there is any. A training that diverged is worse than any other.
pub(super) fn choose(known: &[Known]) -> Option<f64> {
    let score = |results: &[Value]| match results.iter().any(|result| result["held_out"].is_null()) {
        true => f64::NEG_INFINITY,
        false => mean(&numbers(results, "held_out")),
    };
    let known = known.iter().filter(|(_, results)| !results.is_empty());
    let scores = known.map(|(rate, results)| (*rate, score(results)));
    scores.reduce(|best, next| if next.1 > best.1 { next } else { best }).map(|(rate, _)| rate)
}

/// What is known of a method on a task at the chosen rate.
struct Cell {
    rate: f64,
    /// Whether a rate beyond those that were tried might be better.
    at_the_end: bool,
    results: Vec<Value>,
}

impl Study<'_> {
    fn cell(&self, task: &Task, entry: &Entry) -> Option<Cell> {
        let tried = self.known(task, entry, &self.choosing_seeds());
        let rate = choose(&tried)?;
        let at_the_end =
            tried.len() > 1 && [tried.first(), tried.last()].iter().flatten().any(|(r, _)| *r == rate);
        let known = self.known(task, entry, &self.seeds());
        let results = known.into_iter().find(|(r, _)| *r == rate).map(|(_, results)| results)?;
        Some(Cell { rate, at_the_end, results })
    }

    /// The table in Markdown.
    pub(super) fn table(&self) -> String {
        let tasks =
            self.tasks.iter().flat_map(|task| [format!("{}, {}", task.name, task.metric), "lr".into()]);
        let head: Vec<String> = ["method".into(), "trained".into()]
            .into_iter()
            .chain(tasks)
            .chain(["mean", "CPU seconds", "peak MiB"].map(String::from))
            .collect();
        let mut lines = vec![row(&head), row(&vec!["---".into(); head.len()])];
        for entry in self.entries {
            let cells: Vec<Option<Cell>> = self.tasks.iter().map(|task| self.cell(task, entry)).collect();
            lines.push(row(&self.line(entry, &cells)));
        }
        lines.push(String::new());
        lines.push(
            "The score of each task on its validation file in %, mean ± standard deviation over seeds (their number; \
             a seed that diverged has no score); the learning rate that was best on held-out rows, with * where it \
             is the first or last that was tried; the mean over tasks; processor time of a training; the most \
             memory of its process."
                .into(),
        );
        lines.join("\n") + "\n"
    }

    fn line(&self, entry: &Entry, cells: &[Option<Cell>]) -> Vec<String> {
        let none = || "–".to_string();
        let all: Vec<Value> = cells.iter().flatten().flat_map(|cell| cell.results.clone()).collect();
        let scores = |cell: &Cell| -> Vec<f64> {
            numbers(&cell.results, "validation").iter().map(|score| 100.0 * score).collect()
        };
        let trained = numbers(&all, "trained_parameters");
        let mut line = vec![entry.to_string(), trained.first().map_or_else(none, |count| count.to_string())];
        for cell in cells {
            let Some(cell) = cell else {
                line.extend([none(), none()]);
                continue;
            };
            let scores = scores(cell);
            let end = if cell.at_the_end { "\\*" } else { "" };
            line.extend([
                score_cell(&scores, cell.results.len() - scores.len()),
                format!("{:e}{end}", cell.rate),
            ]);
        }
        let means: Vec<f64> =
            cells.iter().flatten().map(scores).filter(|s| !s.is_empty()).map(|s| mean(&s)).collect();
        let (seconds, peaks) = (numbers(&all, "cpu_seconds"), numbers(&all, "peak_bytes"));
        line.push(if means.len() == self.tasks.len() { format!("{:.1}", mean(&means)) } else { none() });
        line.push(if seconds.is_empty() { none() } else { format!("{:.0}", mean(&seconds)) });
        let peak = peaks.iter().copied().reduce(f64::max);
        line.push(peak.map_or_else(none, |bytes| format!("{:.0}", bytes / 1048576.0)));
        line
    }

    /// Writes the table and the pictures, and says where they are.
    pub(super) fn write(&self, out: &Path, table: &str) -> Result<Vec<PathBuf>, Failure> {
        let path = out.join("table.md");
        write_whole(&path, |file| file.write_all(table.as_bytes()))?;
        let mut written = vec![path];
        for task in self.tasks {
            let curves: Vec<Curve> =
                self.entries.iter().filter_map(|entry| self.curve(task, entry)).collect();
            if !curves.is_empty() {
                let title = format!("{}: {} on its validation file", task.name, task.metric);
                let path = out.join(format!("{}.svg", task.name));
                let labels = ("learning rate", "% (mean of the seeds)");
                written.push(draw(&path, &title, labels, Axis::Powers, &curves)?);
            }
        }
        Ok(written)
    }

    /// The mean score over the learning rate.
    fn curve(&self, task: &Task, entry: &Entry) -> Option<Curve> {
        let known = self.known(task, entry, &self.seeds());
        let point = |(rate, results): Known| {
            let scores = numbers(&results, "validation");
            (!scores.is_empty()).then(|| (rate.log10(), 100.0 * mean(&scores)))
        };
        let points: Vec<(f64, f64)> = known.into_iter().filter_map(point).collect();
        (!points.is_empty()).then(|| Curve { name: entry.to_string(), points })
    }
}

/// The scores of a method on a task, and how many seeds have none.
fn score_cell(scores: &[f64], diverged: usize) -> String {
    let count = match diverged {
        0 => scores.len().to_string(),
        _ => format!("{}, {diverged} diverged", scores.len()),
    };
    match scores.len() {
        0 => "diverged".into(),
        1 => format!("{:.1} ({count})", scores[0]),
        _ => format!("{:.1} ± {:.1} ({count})", mean(scores), spread(scores)),
    }
}

fn row(cells: &[String]) -> String {
    format!("| {} |", cells.join(" | "))
}
