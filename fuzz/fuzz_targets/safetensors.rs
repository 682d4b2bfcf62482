//! Whatever a safetensors file holds is an error or tensors that can be read, never a panic or memory
//! beyond the file's size.
#![no_main]

use libfuzzer_sys::fuzz_target;
use randlora::Device;
use randlora::io::{FileType, SafeTensors};

fuzz_target!(|data: &[u8]| {
    // Half of the inputs are a header and data, divided by a line's end: a fuzzer seldom guesses the
    // length that has to stand before them.
    let bytes = match data.split_first() {
        Some((byte, rest)) if byte % 2 == 1 => {
            let end = rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len());
            let mut bytes = (end as u64).to_le_bytes().to_vec();
            bytes.extend_from_slice(&rest[..end]);
            bytes.extend_from_slice(rest.get(end + 1..).unwrap_or_default());
            bytes
        }
        _ => data.to_vec(),
    };
    let total = bytes.len();
    let Ok(file) = SafeTensors::from_bytes("fuzz", bytes) else { return };
    let mut sum = 0;
    for (name, entry) in file.entries() {
        sum += (entry.range.end - entry.range.start) as usize;
        match entry.dtype {
            // A tensor has at most as many dimensions as this crate allows.
            FileType::Float(_) => {
                if let Ok(x) = file.tensor(name, &Device::cpu()) {
                    assert_eq!(x.dims(), entry.dims);
                }
            }
            _ => {
                if let Ok((numbers, dims)) = file.integers(name) {
                    assert_eq!(numbers.len(), dims.iter().product::<usize>());
                }
            }
        }
    }
    assert!(sum < total);
});
