//! What the tests against files from Python share.

use std::fs;
use std::path::{Path, PathBuf};

use randlora::io::{Access, Checkpoint, SafeTensors};
use randlora::models::{Bert, BertLoad};
use randlora::nn::{TokenBatch, TokenIds};
use randlora::{DType, Device, Error, Tensor};

/// How far outputs may be from Python's, in units of the largest of them. Python computed in f64 from
/// the same stored weights, so what is left is rounding: some hundred operations of f32 (6e-8) or f64
/// (1e-16) one after the other, with room for another order of summation.
pub(crate) const OUTPUTS: [(DType, f64); 2] = [(DType::F32, 1e-5), (DType::F64, 1e-12)];

/// A folder or file below tests/oracle.
pub(crate) fn oracle(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle").join(path)
}

pub(crate) fn tensors(path: &Path) -> SafeTensors {
    SafeTensors::open(path, Access::Read).unwrap()
}

pub(crate) fn load(folder: &Path, access: Access) -> Bert {
    let checkpoint = Checkpoint::open(folder, access).unwrap();
    Bert::load(&checkpoint, BertLoad::default(), &Device::cpu()).unwrap().0
}

pub(crate) fn values(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().to_vec().unwrap()
}

pub(crate) fn expected(file: &SafeTensors, name: &str) -> Vec<f64> {
    values(&file.tensor(name, &Device::cpu()).unwrap())
}

/// These rows of `input_ids`, `attention_mask` and `token_type_ids`, or all of them.
pub(crate) fn batch(file: &SafeTensors, rows: Option<&[usize]>) -> TokenBatch {
    let [ids, mask, types] =
        ["input_ids", "attention_mask", "token_type_ids"].map(|name| file.integers(name).unwrap());
    let length = ids.1[1];
    let all: Vec<usize> = (0..ids.1[0]).collect();
    let row = |&r: &usize| {
        let part = |numbers: &[i64]| numbers[r * length..][..length].iter().map(|&n| n as u32).collect();
        let mask: Vec<u32> = part(&mask.0);
        TokenIds {
            ids: part(&ids.0),
            segments: part(&types.0),
            mask: mask.into_iter().map(|m| m != 0).collect(),
        }
    };
    let rows: Vec<TokenIds> = rows.unwrap_or(&all).iter().map(row).collect();
    TokenBatch::pad(&rows.iter().collect::<Vec<_>>(), 0).unwrap()
}

pub(crate) fn largest(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |m, x| m.max(x.abs()))
}

/// max|a − b|.
pub(crate) fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().chain(b).all(|x| x.is_finite()), "not a number among them");
    a.iter().zip(b).fold(0.0, |m, (a, b)| m.max((a - b).abs()))
}

/// Fails unless the values are within `tolerance` of the expected ones, relative to the largest.
pub(crate) fn close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    let apart = distance(got, want) / largest(want);
    println!("{what}: {apart:.1e}");
    assert!(apart <= tolerance, "{what}: {apart:e} > {tolerance:e}");
}

/// Fails unless the error is one line of moderate length with all these parts.
pub(crate) fn says(error: &Error, parts: &[&str]) {
    let message = error.to_string();
    assert!(message.lines().count() == 1 && message.len() < 1000, "{message}");
    for part in parts {
        assert!(message.contains(part), "{message}\nlacks: {part}");
    }
}

/// A folder that goes when the test ends.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    /// A folder with copies of these files.
    pub(crate) fn with(name: &str, files: &[PathBuf]) -> Folder {
        let path = std::env::temp_dir().join(format!("randlora-test-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        for file in files {
            fs::copy(file, path.join(file.file_name().unwrap())).unwrap();
        }
        Folder(path)
    }

    /// Replaces a text in one of the files, where it must be.
    pub(crate) fn edit(&self, file: &str, from: &str, to: &str) {
        let text = fs::read_to_string(self.0.join(file)).unwrap();
        assert!(text.contains(from), "{text}\nlacks: {from}");
        fs::write(self.0.join(file), text.replace(from, to)).unwrap();
    }

    /// Writes the tensors of a file that `keep` gives a name to.
    pub(crate) fn rename(&self, source: &Path, file: &str, keep: impl Fn(&str) -> Option<String>) {
        let source = tensors(source);
        let one = |name: &str| Some((keep(name)?, source.tensor(name, &Device::cpu()).unwrap()));
        let kept: Vec<(String, Tensor)> = source.entries().filter_map(|(name, _)| one(name)).collect();
        randlora::io::save_safetensors(&self.0.join(file), &kept, &[("format", "pt")]).unwrap();
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
