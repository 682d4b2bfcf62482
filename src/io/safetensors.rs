//! The safetensors format: eight bytes with the length of a header, the header (JSON: names, types,
//! shapes, places), the data. Everything little-endian.
//!
//! Own code, because strictness is the point and the `safetensors` crate brings 25 packages for it:
//! a header must describe the data exactly, every byte once. What is wrong is named.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde_core::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::Value;

use crate::compute;
use crate::device::Device;
use crate::dtype::{BF16, DType, F16};
use crate::error::{Error, Result};
use crate::io::files::{io_error, write_whole};
use crate::io::map::{Access, Source};
use crate::shape::Shape;
use crate::storage::{Mapped, Stored, dispatch_stored};
use crate::tensor::Tensor;

/// The longest header that the reference implementation reads, too.
const MAX_HEADER: u64 = 100_000_000;

/// The type of a tensor in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileType {
    /// One that tensors have here.
    Float(DType),
    /// Integers of so many bytes, with or without a sign.
    Integer {
        /// Bytes of one.
        bytes: usize,
        /// Whether it has a sign.
        signed: bool,
    },
    /// 0 or 1 in a byte each.
    Bool,
}

const TYPES: [(&str, FileType); 13] = [
    ("F64", FileType::Float(DType::F64)),
    ("F32", FileType::Float(DType::F32)),
    ("F16", FileType::Float(DType::F16)),
    ("BF16", FileType::Float(DType::BF16)),
    ("I64", FileType::Integer { bytes: 8, signed: true }),
    ("I32", FileType::Integer { bytes: 4, signed: true }),
    ("I16", FileType::Integer { bytes: 2, signed: true }),
    ("I8", FileType::Integer { bytes: 1, signed: true }),
    ("U64", FileType::Integer { bytes: 8, signed: false }),
    ("U32", FileType::Integer { bytes: 4, signed: false }),
    ("U16", FileType::Integer { bytes: 2, signed: false }),
    ("U8", FileType::Integer { bytes: 1, signed: false }),
    ("BOOL", FileType::Bool),
];

impl FileType {
    fn by_name(name: &str) -> Option<FileType> {
        TYPES.iter().find(|(n, _)| *n == name).map(|(_, t)| *t)
    }

    /// The name in the file.
    pub fn name(self) -> &'static str {
        TYPES.iter().find(|(_, t)| *t == self).map_or("?", |(n, _)| n)
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            FileType::Float(dtype) => dtype.size(),
            FileType::Integer { bytes, .. } => bytes,
            FileType::Bool => 1,
        }
    }
}

impl fmt::Display for FileType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a file says of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The type.
    pub dtype: FileType,
    /// The sizes of the dimensions.
    pub dims: Vec<usize>,
    /// The bytes, from the beginning of the file.
    pub range: Range<u64>,
}

/// An open file.
///
/// ```no_run
/// use randlora::io::{Access, SafeTensors};
/// use randlora::Device;
///
/// let file = SafeTensors::open("model.safetensors".as_ref(), Access::Map)?;
/// for (name, entry) in file.entries() {
///     println!("{name} {} {:?}", entry.dtype, entry.dims);
/// }
/// let weight = file.tensor("classifier.weight", &Device::cpu())?; // nothing is copied
/// # Ok::<(), randlora::Error>(())
/// ```
pub struct SafeTensors {
    what: String,
    source: Source,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

impl fmt::Debug for SafeTensors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SafeTensors({}, {} tensors)", self.what, self.entries.len())
    }
}

impl SafeTensors {
    /// Opens a file and checks its header.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Data`] for a file that is not what its header says: cut short, too
    /// long, with gaps, overlaps, duplicate names, unknown types, sizes that overflow.
    pub fn open(path: &Path, access: Access) -> Result<SafeTensors> {
        let (source, len) = Source::open(path, access)?;
        SafeTensors::parse(path.display().to_string(), source, len)
    }

    /// The same for a file in memory; errors call it `what`.
    pub fn from_bytes(what: &str, bytes: Vec<u8>) -> Result<SafeTensors> {
        let len = bytes.len() as u64;
        SafeTensors::parse(what.into(), Source::Memory(Arc::new(bytes)), len)
    }

    fn parse(what: String, source: Source, len: u64) -> Result<SafeTensors> {
        let fail = |message: String| Error::data(what.clone(), message);
        let read = |range: Range<u64>| {
            let mut bytes = Vec::new();
            source
                .read(range, &mut |piece| bytes.extend_from_slice(piece))
                .map_err(|e| io_error(Path::new(&what), e))?;
            Ok::<_, Error>(bytes)
        };
        if len < 8 {
            return Err(fail(format!(
                "{len} bytes are no safetensors file: the header's length alone takes 8"
            )));
        }
        let length = u64::from_le_bytes(read(0..8)?.try_into().expect("8 bytes were read"));
        if length > MAX_HEADER || length > len - 8 {
            let message = format!(
                "the header should have {length} bytes, but the file ends {} after its length",
                len - 8
            );
            return Err(fail(format!("{message}: it is cut short or no safetensors file")));
        }
        let header = read(8..8 + length)?;
        if header.first() != Some(&b'{') {
            return Err(fail("the header does not begin with `{`: this is no safetensors file".into()));
        }
        let header: Header =
            serde_json::from_slice(&header).map_err(|e| fail(format!("the header is no valid JSON: {e}")))?;
        let (entries, metadata) = header.check(8 + length, len).map_err(fail)?;
        Ok(SafeTensors { what, source, entries, metadata })
    }

    /// All tensors with their names, in the names' order.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// One tensor's entry.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// What errors call the file.
    pub(crate) fn what(&self) -> &str {
        &self.what
    }

    /// What the file says of itself beside its tensors.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    fn find(&self, name: &str) -> Result<&Entry> {
        self.entry(name).ok_or_else(|| {
            let names = self.entries.keys().take(8).cloned().collect::<Vec<_>>().join(", ");
            let more = if self.entries.len() > 8 { ", …" } else { "" };
            Error::data(self.what.clone(), format!("there is no tensor `{name}`; there are: {names}{more}"))
        })
    }

    /// A tensor of one of this crate's types. Of a mapped file it is read where it lies, unless it lies
    /// at no multiple of its elements' size, which the format allows; then it is copied.
    ///
    /// # Errors
    /// [`Error::Data`] where there is none of that name, or where it is of integers.
    pub fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        let entry = self.find(name)?;
        let FileType::Float(dtype) = entry.dtype else {
            let message =
                format!("`{name}` is {}: a tensor of floating point numbers is needed", entry.dtype);
            return Err(Error::data(self.what.clone(), message));
        };
        let shape = Shape::new(&entry.dims)?;
        if let Source::Memory(bytes) = &self.source {
            let range = entry.range.start as usize..entry.range.end as usize;
            if let Some(mapped) = Mapped::new(bytes.clone(), range, dtype) {
                return Tensor::from_mapped(mapped, dtype, shape, &device.on_host()).moved(device);
            }
        }
        dispatch_stored!(dtype, T => {
            let mut elements = device.host().buffer::<T>(shape.numel())?;
            let mut rest = &mut elements[..];
            self.read(entry, &mut |bytes| {
                let (now, later) = std::mem::take(&mut rest).split_at_mut(bytes.len() / size_of::<T>());
                now.iter_mut().zip(bytes.chunks_exact(size_of::<T>())).for_each(|(x, b)| *x = T::from_little(b));
                rest = later;
            })?;
            Tensor::from_buffer(elements, shape, &device.on_host()).moved(device)
        })
    }

    /// A tensor of integers or truth values, and its sizes.
    ///
    /// # Errors
    /// [`Error::Data`] where there is none of that name, where it is of floating point numbers, or
    /// where a number is beyond i64.
    pub fn integers(&self, name: &str) -> Result<(Vec<i64>, Vec<usize>)> {
        let entry = self.find(name)?;
        let (size, signed) = match entry.dtype {
            FileType::Integer { bytes, signed } => (bytes, signed),
            FileType::Bool => (1, false),
            FileType::Float(_) => {
                let message = format!("`{name}` is {}: a tensor of integers is needed", entry.dtype);
                return Err(Error::data(self.what.clone(), message));
            }
        };
        let mut numbers = Vec::new();
        self.read(entry, &mut |bytes| {
            numbers.extend(bytes.chunks_exact(size).map(|b| {
                let fill = if signed && b[size - 1] > 127 { 255 } else { 0 };
                let mut wide = [fill; 8];
                wide[..size].copy_from_slice(b);
                i64::from_le_bytes(wide)
            }));
        })?;
        if !signed && size == 8 && numbers.iter().any(|&n| n < 0) {
            return Err(Error::data(self.what.clone(), format!("`{name}` has numbers beyond i64")));
        }
        Ok((numbers, entry.dims.clone()))
    }

    fn read(&self, entry: &Entry, f: &mut dyn FnMut(&[u8])) -> Result<()> {
        self.source.read(entry.range.clone(), f).map_err(|e| io_error(Path::new(&self.what), e))
    }
}

/// The header as it is written: a list, since JSON objects may repeat a name.
struct Header(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Header, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let (mut entries, mut names) = (Vec::new(), std::collections::BTreeSet::new());
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if !names.insert(name.clone()) {
                        return Err(A::Error::custom(format!("the name `{name}` is there twice")));
                    }
                    entries.push((name, value));
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Names)
    }
}

type Checked = (BTreeMap<String, Entry>, BTreeMap<String, String>);

impl Header {
    /// The entries, if they describe the bytes from `start` to `end` exactly.
    fn check(self, start: u64, end: u64) -> std::result::Result<Checked, String> {
        let (mut entries, mut metadata) = (BTreeMap::new(), BTreeMap::new());
        for (name, value) in self.0 {
            if name == "__metadata__" {
                metadata = texts(&value).ok_or("`__metadata__` is not an object of texts")?;
            } else {
                let entry = entry(&value, start).map_err(|message| format!("`{name}`: {message}"))?;
                entries.insert(name, entry);
            }
        }
        let mut order: Vec<(&String, &Entry)> = entries.iter().collect();
        order.sort_by_key(|(_, entry)| (entry.range.start, entry.range.end));
        let mut at = start;
        for (name, Entry { range, .. }) in order {
            if range.end > end {
                let missing = range.end - end;
                return Err(format!("`{name}` ends {missing} bytes after the file: it is cut short"));
            }
            if range.start != at {
                let what =
                    if range.start < at { "overlaps the tensor before it" } else { "leaves a gap before it" };
                return Err(format!("`{name}` {what}: {} where {} is due", range.start - start, at - start));
            }
            at = range.end;
        }
        if at != end {
            return Err(format!("{} bytes at the end belong to no tensor", end - at));
        }
        Ok((entries, metadata))
    }
}

fn texts(value: &Value) -> Option<BTreeMap<String, String>> {
    value.as_object()?.iter().map(|(key, value)| Some((key.clone(), value.as_str()?.to_string()))).collect()
}

/// One tensor's entry, its bytes counted from the beginning of the file.
fn entry(value: &Value, start: u64) -> std::result::Result<Entry, String> {
    let numbers = |field: &str| -> Option<Vec<u64>> {
        value.get(field)?.as_array()?.iter().map(Value::as_u64).collect()
    };
    let name = value.get("dtype").and_then(Value::as_str).ok_or("`dtype` is missing")?;
    let dtype = FileType::by_name(name).ok_or_else(|| {
        let known: Vec<&str> = TYPES.iter().map(|(name, _)| *name).collect();
        format!("the type {name} is not known here; known are: {}", known.join(", "))
    })?;
    let shape = numbers("shape").ok_or("`shape` is not a list of numbers from 0")?;
    let offsets = numbers("data_offsets").ok_or("`data_offsets` is not a list of numbers from 0")?;
    let &[from, to] = &offsets[..] else { return Err("`data_offsets` needs two numbers".into()) };
    let bytes = shape.iter().try_fold(dtype.size() as u64, |product, &size| product.checked_mul(size));
    let dims = shape.iter().map(|&size| size.try_into().ok()).collect::<Option<Vec<usize>>>();
    let (Some(bytes), Some(dims)) = (bytes, dims) else {
        return Err(format!("the shape {shape:?} overflows"));
    };
    if to < from || to - from != bytes {
        return Err(format!(
            "{shape:?} of {name} takes {bytes} bytes, but `data_offsets` are {from} to {to}"
        ));
    }
    match (start.checked_add(from), start.checked_add(to)) {
        (Some(from), Some(to)) => Ok(Entry { dtype, dims, range: from..to }),
        _ => Err(format!("`data_offsets` {from} to {to} overflow")),
    }
}

/// An element as the format has it.
trait Little: Stored {
    fn from_little(bytes: &[u8]) -> Self;
    fn append_to(self, bytes: &mut Vec<u8>);
}

macro_rules! little {
    ($($T:ty: $bits:ty, $wrap:expr, $unwrap:expr;)*) => {$(
        impl Little for $T {
            fn from_little(bytes: &[u8]) -> $T {
                $wrap(<$bits>::from_le_bytes(bytes.try_into().expect("as many bytes as the type has")))
            }
            fn append_to(self, bytes: &mut Vec<u8>) {
                bytes.extend_from_slice(&$unwrap(self).to_le_bytes());
            }
        }
    )*};
}
little! {
    f32: u32, f32::from_bits, f32::to_bits;
    f64: u64, f64::from_bits, f64::to_bits;
    BF16: u16, BF16, |x: BF16| x.0;
    F16: u16, F16, |x: F16| x.0;
}

/// Writes tensors to a file, whole or not at all. The same tensors give the same bytes: they are
/// ordered by the size of their elements, largest first, so that all lie at multiples of it, then by
/// name.
///
/// # Errors
/// [`Error::Io`]; [`Error::Data`] for a name that is there twice or reserved.
pub fn save_safetensors(path: &Path, tensors: &[(String, Tensor)], metadata: &[(&str, &str)]) -> Result<()> {
    let mut order: Vec<&(String, Tensor)> = tensors.iter().collect();
    order.sort_by(|(a, x), (b, y)| (y.dtype().size(), a).cmp(&(x.dtype().size(), b)));
    let header =
        header(&order, metadata).map_err(|message| Error::data(path.display().to_string(), message))?;
    let contiguous =
        order.iter().map(|(_, x)| compute::contiguous(&x.on_host()?)).collect::<Result<Vec<_>>>()?;
    write_whole(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        contiguous.iter().try_for_each(|x| {
            dispatch_stored!(x.dtype(), T => write_elements(x.elements::<T>().map_err(std::io::Error::other)?, out))
        })
    })
}

fn write_elements<T: Little>(elements: &[T], out: &mut dyn std::io::Write) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    elements.chunks(1 << 16).try_for_each(|chunk| {
        bytes.clear();
        chunk.iter().for_each(|x| x.append_to(&mut bytes));
        out.write_all(&bytes)
    })
}

fn header(order: &[&(String, Tensor)], metadata: &[(&str, &str)]) -> std::result::Result<String, String> {
    let quoted = |text: &str| Value::from(text).to_string();
    let mut fields = Vec::new();
    if !metadata.is_empty() {
        let pairs: Vec<String> =
            metadata.iter().map(|(k, v)| format!("{}:{}", quoted(k), quoted(v))).collect();
        fields.push(format!("\"__metadata__\":{{{}}}", pairs.join(",")));
    }
    let (mut at, mut names) = (0, std::collections::BTreeSet::from(["__metadata__"]));
    for (name, x) in order {
        if !names.insert(name) {
            return Err(format!("two tensors would be called `{name}`"));
        }
        let (dtype, end) = (FileType::Float(x.dtype()), at + x.numel() * x.dtype().size());
        fields.push(format!(
            "{}:{{\"dtype\":\"{dtype}\",\"shape\":{:?},\"data_offsets\":[{at},{end}]}}",
            quoted(name),
            x.dims()
        ));
        at = end;
    }
    let mut header = format!("{{{}}}", fields.join(","));
    // The data begins at a multiple of 8 bytes, as does every tensor in it that needs to.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    Ok(header)
}
