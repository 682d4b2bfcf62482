//! Several adapters of one model: what they are called, what each counts, whose classifier is used.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use randlora::adapters::{Adapted, Whole};
use randlora::io::Adapter;
use randlora::models::Bert;
use randlora::{Error, Result};

use super::about::About;
use super::model::{ModelArgs, check_complete};
use super::table::wrong;

/// An adapter's folder, with a name where it was given one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    name: Option<String>,
    pub(crate) folder: PathBuf,
}

impl Named {
    /// What the adapter is called: by its name, or by its folder as it was typed.
    pub(crate) fn name(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.folder.display().to_string())
    }
}

/// `NAME=DIR` with a name of letters, digits, `-`, `_` and `.`; all else is a folder, and so is what there is.
impl From<OsString> for Named {
    fn from(argument: OsString) -> Named {
        let plain = |name: &str| {
            !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || ['-', '_', '.'].contains(&c))
        };
        let parts = argument.to_str().and_then(|text| text.split_once('=')).filter(|(name, _)| plain(name));
        match parts.filter(|_| !Path::new(&argument).exists()) {
            Some((name, folder)) => Named { name: Some(name.into()), folder: folder.into() },
            None => Named { name: None, folder: argument.into() },
        }
    }
}

/// How several adapters make one.
#[derive(Debug, clap::Args)]
pub(crate) struct MixArgs {
    /// The weighted sum of the adapters instead of one after the other: a number for each, in their order.
    #[arg(long, value_name = "W,…", value_delimiter = ',', allow_hyphen_values = true, requires = "adapter", value_parser = finite)]
    weights: Vec<f64>,
    /// Whose classifier the sum has, where several adapters have one: the name of one, or `sum` for that of theirs.
    #[arg(long, value_name = "NAME", requires = "weights")]
    head: Option<String>,
}

fn finite(text: &str) -> std::result::Result<f64, String> {
    text.parse().ok().filter(|x: &f64| x.is_finite()).ok_or("a finite number is needed".into())
}

/// Adapters with their names, in the order of the arguments.
pub(crate) type Opened = [(String, Adapter)];

/// What a model is used with: nothing, one adapter, or a weighted sum.
#[derive(Debug)]
pub(crate) struct Use {
    /// What it is called, where there are several.
    pub(crate) name: Option<String>,
    parts: Vec<(String, f64)>,
    whole: Whole,
    /// The weights of those that have a classifier, together.
    heads: f64,
    /// The folder that says what it is for.
    pub(crate) folder: PathBuf,
}

impl MixArgs {
    /// Whether there is to be a sum.
    pub(crate) fn is_sum(&self) -> bool {
        !self.weights.is_empty()
    }

    /// What the model is to be used with, one after the other.
    ///
    /// # Errors
    /// [`Error::Config`] for weights that are not one for each adapter, or where it is left open whose classifier is
    /// used; [`Error::Data`] for a sum of classifiers of different classes.
    pub(crate) fn uses(&self, args: &ModelArgs, opened: &Opened) -> Result<Vec<Use>> {
        if self.is_sum() {
            return Ok(vec![self.sum(args, opened)?]);
        }
        let one = |(named, (name, _)): (&Named, &(String, Adapter))| Use {
            name: (opened.len() > 1).then(|| name.clone()),
            parts: vec![(name.clone(), 1.0)],
            whole: Whole::Apart,
            heads: 1.0,
            folder: named.folder.clone(),
        };
        let base =
            || Use { name: None, parts: vec![], whole: Whole::Apart, heads: 0.0, folder: args.model.clone() };
        let uses: Vec<Use> = args.adapter.iter().zip(opened).map(one).collect();
        Ok(if uses.is_empty() { vec![base()] } else { uses })
    }

    fn sum(&self, args: &ModelArgs, opened: &Opened) -> Result<Use> {
        let (given, wanted) = (self.weights.len(), opened.len());
        if given != wanted {
            let message = format!("{given} for {wanted} adapters: give each `--adapter` one, in their order");
            return Err(Error::Config { what: "--weights", message });
        }
        let whole = self.whole(opened)?;
        let folders: Vec<&Path> = args.adapter.iter().map(|named| named.folder.as_path()).collect();
        let with_head: Vec<usize> = (0..opened.len()).filter(|&i| has_classifier(&opened[i].1)).collect();
        if whole == Whole::Sum {
            same_tasks(&with_head.iter().map(|&i| folders[i]).collect::<Vec<_>>())?;
        }
        let named = |i: &&usize| matches!(&whole, Whole::Of(name) if *name == opened[**i].0);
        let owner = with_head.iter().find(named).or(with_head.first()).copied().unwrap_or(0);
        let parts = opened.iter().map(|(name, _)| name.clone()).zip(self.weights.iter().copied()).collect();
        let heads = with_head.iter().map(|&i| self.weights[i]).sum();
        Ok(Use { name: None, parts, whole, heads, folder: folders[owner].to_path_buf() })
    }

    fn whole(&self, opened: &Opened) -> Result<Whole> {
        let mut holders: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, adapter) in opened {
            adapter.whole().into_iter().for_each(|(p, _)| holders.entry(p).or_default().push(name));
        }
        let error = |message| Err(Error::Config { what: "--head", message });
        match (holders.iter().find(|(_, holders)| holders.len() > 1), self.head.as_deref()) {
            (None, None) => Ok(Whole::Apart),
            (Some((parameter, holders)), None) => error(format!(
                "`{}` have each a `{parameter}`: say whose is used, as in `--head {}`, or that theirs are summed with \
                 `--head sum`",
                holders.join("` and `"),
                holders[0]
            )),
            (_, Some(name)) if opened.iter().any(|(other, _)| other == name) => Ok(Whole::Of(name.into())),
            (_, Some("sum")) => Ok(Whole::Sum),
            (_, Some(name)) => {
                let names: Vec<&str> = opened.iter().map(|(name, _)| name.as_str()).collect();
                error(format!("there is no adapter `{name}`; there are: {}, or `sum`", names.join(", ")))
            }
        }
    }
}

fn has_classifier(adapter: &Adapter) -> bool {
    adapter.whole().iter().any(|(name, _)| *name == "classifier.weight")
}

/// An error unless all these folders are for the same classes in the same order.
fn same_tasks(folders: &[&Path]) -> Result<()> {
    let tasks = folders.iter().map(|folder| Ok(About::read(folder)?.map(|about| about.task)));
    let tasks = tasks.collect::<Result<Vec<_>>>()?;
    match folders.iter().zip(&tasks).find(|(_, task)| **task != tasks[0]) {
        Some((folder, _)) => {
            let message = format!(
                "it has not the classes of {}, so that their classifiers cannot be summed: say whose is used with \
                 `--head`",
                folders[0].display()
            );
            Err(wrong(folder, message))
        }
        None => Ok(()),
    }
}

/// The last part of the model's name or folder that an adapter was made for.
pub(crate) fn base_name(adapter: &Adapter) -> Option<&str> {
    let name = adapter.base_model()?.trim_end_matches(['/', '\\']);
    name.rsplit(['/', '\\']).next().filter(|name| !name.is_empty())
}

/// Says where adapters name different models: it shows in nothing else if the sizes are the same.
pub(crate) fn note_models(opened: &Opened) {
    let mut named = opened.iter().filter_map(|(name, adapter)| Some((name, base_name(adapter)?)));
    let Some((first, one)) = named.next() else { return };
    if let Some((name, other)) = named.find(|(_, other)| *other != one) {
        eprintln!("note: `{first}` was made for {one} and `{name}` for {other}: is it the same model?");
    }
}

impl Use {
    /// The adapter, if it is one as it is.
    pub(crate) fn adapter(&self) -> Option<&str> {
        match &self.parts[..] {
            [(name, 1.0)] => Some(name),
            _ => None,
        }
    }

    /// Makes these adapters the model's active ones, which have to give it all that its folder lacks.
    ///
    /// # Errors
    /// [`Error::Data`] for a part of the model that neither its folder nor the adapters have; [`Error::Config`] as
    /// [`Adapted::combine`].
    pub(crate) fn turn_on(&self, model: &mut Adapted<Bert>, fresh: &[String], from: &Path) -> Result<()> {
        let parts: Vec<(&str, f64)> =
            self.parts.iter().map(|(name, weight)| (name.as_str(), *weight)).collect();
        match parts.is_empty() {
            true => model.deactivate()?,
            false => model.combine(&parts, self.whole.clone())?,
        }
        check_complete(model, fresh, from)?;
        if self.whole == Whole::Sum && !fresh.is_empty() && (self.heads - 1.0).abs() > 1e-12 {
            let message = format!(
                "those of adapters with a classifier sum to {}, but the model has none to make up the rest to 1: let \
                 them sum to 1, or say whose classifier is used with `--head`",
                self.heads
            );
            return Err(Error::Config { what: "--weights", message });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_folders_are_told_apart() {
        let named = |text: &str| Named::from(OsString::from(text));
        for (text, name, folder) in [
            ("sst2/best", "sst2/best", "sst2/best"),
            ("a=sst2/best", "a", "sst2/best"),
            ("a.b-c_1=x", "a.b-c_1", "x"),
            ("a=lr=3e-4/best", "a", "lr=3e-4/best"),
            // What is before the sign is no name.
            ("runs/lr=3e-4", "runs/lr=3e-4", "runs/lr=3e-4"),
            ("=x", "=x", "=x"),
            (r"C:\runs\best", r"C:\runs\best", r"C:\runs\best"),
            (r"a=C:\runs\best", "a", r"C:\runs\best"),
        ] {
            let found = named(text);
            assert_eq!((found.name().as_str(), found.folder.as_path()), (name, Path::new(folder)));
        }
        // A folder that is there is that folder.
        let there = std::env::temp_dir().join(format!("a-{}=b", std::process::id()));
        std::fs::create_dir_all(&there).expect("a folder");
        assert_eq!(Named::from(there.clone().into_os_string()).folder, there);
        std::fs::remove_dir(&there).expect("it was made");
    }
}
