//! Files that lie, and those that do not.

use std::fs;
use std::path::PathBuf;

use super::*;
use crate::device::Device;
use crate::dtype::DType;
use crate::error::Error;
use crate::tensor::Tensor;

/// A folder that goes when the test ends.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("randlora-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("a temporary folder");
        Folder(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        if name.is_empty() { self.0.clone() } else { self.0.join(name) }
    }

    pub(crate) fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        fs::write(self.path(name), contents).expect("a temporary file");
        self.path(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A file with this header and so many bytes of data.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend((0..data).map(|i| i as u8));
    bytes
}

fn refused(bytes: Vec<u8>) -> String {
    SafeTensors::from_bytes("x", bytes).expect_err("it is malformed").to_string()
}

fn entry(name: &str, dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
}

#[test]
fn attacks_are_named() {
    let one = |entry: String, data| refused(file(&format!("{{{entry}}}"), data));
    let whole = file(&format!("{{{}}}", entry("a", "F32", "[2]", "[0,8]")), 8);
    assert!(SafeTensors::from_bytes("x", whole.clone()).is_ok());
    let cases: Vec<(String, &str)> = vec![
        (refused(vec![]), "0 bytes are no safetensors file"),
        (refused(vec![1; 7]), "7 bytes are no"),
        (refused(file("{}", 0)[..9].to_vec()), "the header should have 2 bytes, but the file ends 1 after"),
        (refused(u64::MAX.to_le_bytes().to_vec()), "the header should have 18446744073709551615 bytes"),
        (refused(file("[]", 0)), "does not begin with `{`"),
        (refused(file("{\u{1}", 0)), "no valid JSON"),
        (refused(file(&("{\"a\":".to_string() + &"[".repeat(100_000)), 0)), "no valid JSON"),
        (refused(file("{\"__metadata__\":{\"a\":1}}", 0)), "`__metadata__` is not an object of texts"),
        (refused(whole[..whole.len() - 1].to_vec()), "`a` ends 1 bytes after the file: it is cut short"),
        (refused([whole.clone(), vec![0; 3]].concat()), "3 bytes at the end belong to no tensor"),
        (one(entry("a", "F33", "[2]", "[0,8]"), 8), "the type F33 is not known here; known are: F64, F32"),
        (one("\"a\":{}".into(), 0), "`dtype` is missing"),
        (one(entry("a", "F32", "2", "[0,8]"), 8), "`shape` is not a list of numbers from 0"),
        (one(entry("a", "F32", "[-2]", "[0,8]"), 8), "`shape` is not a list"),
        (one(entry("a", "F32", "[2.5]", "[0,8]"), 8), "`shape` is not a list"),
        (one(entry("a", "F32", "[2]", "[0]"), 8), "`data_offsets` needs two numbers"),
        (one(entry("a", "F32", "[2]", "[8,0]"), 8), "takes 8 bytes, but `data_offsets` are 8 to 0"),
        (one(entry("a", "F32", "[3]", "[0,8]"), 8), "[3] of F32 takes 12 bytes"),
        (one(entry("a", "F32", "[4294967296,4294967296]", "[0,8]"), 8), "overflows"),
        (one(entry("a", "U8", "[18446744073709551615]", "[0,18446744073709551615]"), 8), "overflow"),
        (one(entry("a", "F32", "[2]", "[4,12]"), 12), "`a` leaves a gap before it: 4 where 0 is due"),
        (
            one([entry("a", "F32", "[2]", "[0,8]"), entry("b", "F32", "[2]", "[4,12]")].join(","), 12),
            "`b` overlaps the tensor before it: 4 where 8 is due",
        ),
        (
            one([entry("a", "F32", "[2]", "[0,8]"), entry("a", "F32", "[2]", "[8,16]")].join(","), 16),
            "the name `a` is there twice",
        ),
    ];
    for (message, part) in cases {
        assert!(message.starts_with("x: ") && message.contains(part), "{message}\nlacks: {part}");
        assert!(message.lines().count() == 1 && message.len() < 300, "{message}");
    }
}

fn values(dtype: DType) -> Tensor {
    let x = Tensor::from_vec(vec![0.5f64, -2.0, 1e30, 0.0, -0.0, 3.25], [2, 3], &Device::cpu()).unwrap();
    x.to_dtype(dtype).unwrap()
}

fn bits(x: &Tensor) -> Vec<u64> {
    x.to_dtype(DType::F64).unwrap().to_vec::<f64>().unwrap().into_iter().map(f64::to_bits).collect()
}

#[test]
fn what_is_written_is_read_again() {
    let folder = Folder::new("safetensors");
    let path = folder.path("x.safetensors");
    let mut tensors: Vec<(String, Tensor)> = [DType::F16, DType::F32, DType::BF16, DType::F64]
        .map(|dtype| (format!("a \"{dtype}\""), values(dtype)))
        .to_vec();
    tensors.push(("turned".into(), values(DType::F32).t().unwrap()));
    tensors.push(("empty".into(), Tensor::zeros([3, 0], DType::F32, &Device::cpu()).unwrap()));
    tensors.push(("scalar".into(), Tensor::scalar(7.0, DType::F32, &Device::cpu()).unwrap()));
    save_safetensors(&path, &tensors, &[("format", "pt")]).unwrap();
    for access in [Access::Map, Access::Read] {
        let (file, device) = (SafeTensors::open(&path, access).unwrap(), Device::cpu());
        assert_eq!(file.metadata()["format"], "pt");
        for (name, x) in &tensors {
            let read = file.tensor(name, &device).unwrap();
            assert_eq!((read.dims(), read.dtype(), bits(&read)), (x.dims(), x.dtype(), bits(x)), "{name}");
        }
    }
    let first = fs::read(&path).unwrap();
    tensors.reverse();
    save_safetensors(&path, &tensors, &[("format", "pt")]).unwrap();
    assert_eq!(fs::read(&path).unwrap(), first);

    tensors.push(tensors[0].clone());
    let error = save_safetensors(&path, &tensors, &[]).unwrap_err().to_string();
    assert!(error.contains("two tensors would be called"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), first);
}

#[test]
fn a_mapped_tensor_takes_no_memory_and_is_copied_when_changed() {
    let folder = Folder::new("mapped");
    let path = folder.path("x.safetensors");
    save_safetensors(&path, &[("w".into(), values(DType::F32))], &[]).unwrap();
    let device = Device::cpu();
    let mut w = SafeTensors::open(&path, Access::Map).unwrap().tensor("w", &device).unwrap();
    assert_eq!(device.memory().live_bytes, 0);
    crate::compute::write::<f32>(&mut w).unwrap()[0] = 9.0;
    assert_eq!(device.memory().live_bytes, 24);
    assert_eq!(w.to_vec::<f32>().unwrap()[..2], [9.0, -2.0]);
    let again = SafeTensors::open(&path, Access::Map).unwrap().tensor("w", &device).unwrap();
    assert_eq!(bits(&again), bits(&values(DType::F32)));
    // The file may be replaced while it is mapped.
    save_safetensors(&path, &[("w".into(), w)], &[]).unwrap();
    assert_eq!(bits(&again), bits(&values(DType::F32)));
}

#[test]
fn a_tensor_in_an_odd_place_is_copied() {
    let header = format!("{{{},{}}}", entry("a", "U8", "[1]", "[0,1]"), entry("b", "F32", "[2]", "[1,9]"));
    let mut bytes = file(&header, 1);
    bytes.extend([1.5f32, -2.5].map(f32::to_le_bytes).concat());
    let read = SafeTensors::from_bytes("x", bytes).unwrap().tensor("b", &Device::cpu()).unwrap();
    assert_eq!(read.to_vec::<f32>().unwrap(), [1.5, -2.5]);
}

#[test]
fn integers_of_all_widths() {
    let header = format!(
        "{{{},{},{}}}",
        entry("i8", "I8", "[2]", "[0,2]"),
        entry("u8", "U8", "[2]", "[2,4]"),
        entry("u64", "U64", "[1]", "[4,12]")
    );
    let mut bytes = file(&header, 0);
    bytes.extend([0xff, 3, 0xff, 3]);
    bytes.extend([0xff; 8]);
    let file = SafeTensors::from_bytes("x", bytes).unwrap();
    assert_eq!(file.integers("i8").unwrap(), (vec![-1, 3], vec![2]));
    assert_eq!(file.integers("u8").unwrap().0, [255, 3]);
    assert!(file.integers("u64").unwrap_err().to_string().contains("beyond i64"));
    assert!(file.tensor("i8", &Device::cpu()).unwrap_err().to_string().contains("`i8` is I8"));
    let error = file.tensor("i9", &Device::cpu()).unwrap_err().to_string();
    assert_eq!(error, "x: there is no tensor `i9`; there are: i8, u64, u8");
}

#[test]
fn folders_that_are_no_models() {
    let folder = Folder::new("checkpoint");
    let open = || Checkpoint::open(&folder.path(""), Access::Map);
    let refused = |part: &str| {
        let message = open().unwrap_err().to_string();
        assert!(message.contains(part) && message.lines().count() == 1, "{message}");
    };
    let missing = Checkpoint::open(&folder.path("nowhere"), Access::Map).unwrap_err();
    assert!(missing.to_string().ends_with("there is no such folder"), "{missing}");
    refused("config.json is missing");
    let config = folder.write("config.json", "{");
    assert!(matches!(Checkpoint::open(&config, Access::Map), Err(Error::Data { .. })));
    refused("config.json: no valid JSON");
    folder.write("config.json", "{}");
    refused("model.safetensors is missing");
    folder.write("pytorch_model.bin", "");
    refused("convert it");
    folder.write("model.safetensors", file(&format!("{{{}}}", entry("a", "F32", "[1]", "[0,4]")), 4));
    assert!(open().unwrap().has("a"));
    folder.write("model.safetensors", "");
    refused("model.safetensors: 0 bytes");
    fs::remove_file(folder.path("model.safetensors")).unwrap();
    for (index, part) in [
        ("{}", "`weight_map` is missing"),
        ("{\"weight_map\":{\"a\":1}}", "not an object of texts"),
        ("{\"weight_map\":{\"a\":\"../x\"}}", "`../x` is no name of a file"),
        ("{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "is no name of a file"),
        ("{\"weight_map\":{\"a\":\"gone\"}}", "gone"),
        ("{\"weight_map\":{\"b\":\"one\"}}", "`b` should be in one, but is not"),
    ] {
        folder.write("one", file(&format!("{{{}}}", entry("a", "F32", "[1]", "[0,4]")), 4));
        folder.write("model.safetensors.index.json", index);
        refused(part);
    }
    folder.write("model.safetensors.index.json", "{\"weight_map\":{\"a\":\"one\"}}");
    assert_eq!(open().unwrap().tensor("a", &Device::cpu()).unwrap().dims(), [1]);
}
