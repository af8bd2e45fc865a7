//! GGUF files written, of version 3.

use std::collections::HashSet;
use std::path::Path;

use super::{DEFAULT_ALIGNMENT, MAGIC};
use crate::error::{Error, Result};
use crate::storage::local;
use crate::tensor::dtype::Dtype;

const VERSION: u32 = 3;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Entry {
    /// A text.
    Text(String),
    /// A number without a sign.
    U32(u32),
    /// A number in binary32.
    F32(f32),
}

/// A tensor that is to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// Its name.
    pub name: String,
    /// Its element type, a floating-point one.
    pub dtype: Dtype,
    /// Its shape, row-major.
    pub shape: Vec<u64>,
}

impl Planned {
    fn bytes(&self) -> u64 {
        self.shape.iter().product::<u64>() * self.dtype.size() as u64
    }

    fn kind(&self) -> u32 {
        match self.dtype {
            Dtype::F32 => 0,
            Dtype::F16 => 1,
            Dtype::F64 => 28,
            Dtype::Bf16 => 30,
            Dtype::Other(_) => unreachable!("it has a floating-point type"),
        }
    }
}

/// What takes the bytes of a tensor, one run after the other.
pub type Take<'a> = dyn FnMut(&[u8]) -> Result<()> + 'a;

/// Writes a GGUF file: whole, or not at all. The bytes of each tensor are asked for by its place, one
/// after the other, and handed over in as many runs as one likes.
///
/// # Errors
/// [`Error::Argument`] for two tensors of one name, [`Error::Io`], what `bytes` returns.
pub fn write(
    path: &Path,
    metadata: &[(String, Entry)],
    tensors: &[Planned],
    mut bytes: impl FnMut(usize, &mut Take<'_>) -> Result<()>,
) -> Result<()> {
    let mut names = HashSet::new();
    if let Some(twice) = tensors.iter().find(|tensor| !names.insert(tensor.name.as_str())) {
        return Err(Error::Argument(format!("two tensors would be called {}", twice.name)));
    }
    let (beginning, starts) = header(metadata, tensors);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let partial = path.with_file_name(name);
    let failed = |error| Error::io(&partial, error);
    let mut written = || -> Result<()> {
        let file = local::create(&partial)?;
        local::write_at(&file, &beginning, 0).map_err(failed)?;
        for (place, (tensor, start)) in tensors.iter().zip(&starts).enumerate() {
            let first = beginning.len() as u64 + start;
            let mut position = first;
            bytes(place, &mut |run| {
                local::write_at(&file, run, position).map_err(failed)?;
                position += run.len() as u64;
                Ok(())
            })?;
            debug_assert_eq!(position - first, tensor.bytes(), "as planned");
            let padding = position.next_multiple_of(DEFAULT_ALIGNMENT) - position;
            local::write_at(&file, &vec![0; padding as usize], position).map_err(failed)?;
        }
        local::rename(&partial, path)
    };
    let result = written();
    if result.is_err() {
        local::remove(&partial);
    }
    result
}

/// The header, padded to where the data begins, and where each tensor begins in the data.
fn header(metadata: &[(String, Entry)], tensors: &[Planned]) -> (Vec<u8>, Vec<u64>) {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    let text = |bytes: &mut Vec<u8>, text: &str| {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    };
    for (key, value) in metadata {
        text(&mut bytes, key);
        match value {
            Entry::U32(value) => {
                bytes.extend(4u32.to_le_bytes());
                bytes.extend(value.to_le_bytes());
            }
            Entry::F32(value) => {
                bytes.extend(6u32.to_le_bytes());
                bytes.extend(value.to_le_bytes());
            }
            Entry::Text(value) => {
                bytes.extend(8u32.to_le_bytes());
                text(&mut bytes, value);
            }
        }
    }
    let mut start = 0u64;
    let mut starts = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        text(&mut bytes, &tensor.name);
        bytes.extend((tensor.shape.len() as u32).to_le_bytes());
        for extent in tensor.shape.iter().rev() {
            bytes.extend(extent.to_le_bytes());
        }
        bytes.extend(tensor.kind().to_le_bytes());
        bytes.extend(start.to_le_bytes());
        starts.push(start);
        start = (start + tensor.bytes()).next_multiple_of(DEFAULT_ALIGNMENT);
    }
    bytes.resize(bytes.len().next_multiple_of(DEFAULT_ALIGNMENT as usize), 0);
    (bytes, starts)
}
