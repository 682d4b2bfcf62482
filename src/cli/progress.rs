//! How far a command is: a bar on a terminal, plain lines elsewhere. Always on standard error.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Progress over several stages of known lengths.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    /// A bar of `total` steps, if somebody is watching.
    pub(crate) fn new(total: u64) -> Progress {
        let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(total));
        if let Some(bar) = &bar {
            let style =
                ProgressStyle::with_template("{bar:30} {percent:>3} %  {elapsed} of about {duration}  {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        }
        Progress { bar }
    }

    /// A new stage begins.
    pub(crate) fn stage(&self, name: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(name.to_string()),
            None => eprintln!("{name}"),
        }
    }

    /// So many steps more are done.
    pub(crate) fn advance(&self, steps: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(steps);
        }
    }

    /// All is done: the bar makes room for the results.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The progress of a training: a bar with the loss, the speed and the time left on a terminal, now and
/// then a line elsewhere.
#[derive(Debug)]
pub(crate) struct TrainingProgress {
    bar: Option<ProgressBar>,
    start: Instant,
    said: Instant,
    total: u64,
}

/// The time between lines where nobody is watching.
const PAUSE: Duration = Duration::from_secs(10);

impl TrainingProgress {
    /// A training of `total` steps begins.
    pub(crate) fn new(total: u64) -> TrainingProgress {
        let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(total));
        if let Some(bar) = &bar {
            let style = ProgressStyle::with_template("{bar:30} step {pos} of {len}  {msg}  {eta} left");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        }
        TrainingProgress { bar, start: Instant::now(), said: Instant::now(), total }
    }

    /// A step was made.
    pub(crate) fn step(&mut self, progress: &randlora::train::Progress, tokens_per_second: f64) {
        let state = format!("loss {:.4}  {tokens_per_second:.0} tokens/s", progress.loss);
        let done = progress.step as u64 + 1;
        if let Some(bar) = &self.bar {
            bar.set_message(state);
            bar.set_position(done);
        } else if self.said.elapsed() >= PAUSE {
            let left = self.start.elapsed().mul_f64((self.total - done) as f64 / done as f64);
            eprintln!("step {done} of {}  {state}  {} s left", self.total, left.as_secs());
            self.said = Instant::now();
        }
    }

    /// Says something that stays.
    pub(crate) fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    /// All is done: the bar makes room for the results.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
