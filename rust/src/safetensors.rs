//! One safetensors file: its header, checked before anything is trusted, and its mapped bytes.
//!
//! The format is eight bytes of little-endian header length, a JSON header, and the data, which
//! the tensors fill without holes. The `safetensors` crate reads it too, but keeps the last of two
//! entries of one name and reports most damage as one bare word; here each kind of damage has its
//! sentence, and types that this version does not know pass through.

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use memmap2::Mmap;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::file::read_at;

/// Bytes of the header length that every file begins with.
const PREFIX: u64 = 8;
/// The longest header that the reference implementation accepts.
const MAXIMUM_HEADER: u64 = 100_000_000;

/// A tensor as the header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape, row-major.
    pub shape: Vec<u64>,
    /// Where its bytes lie, counted from the beginning of the data.
    pub range: Range<u64>,
}

impl TensorInfo {
    /// Number of bytes.
    pub fn bytes(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// A checked header.
#[derive(Debug, Clone, Default)]
pub struct Header {
    /// The free-form `__metadata__`, in the order of the file.
    pub metadata: IndexMap<String, String>,
    /// The tensors in the order of their data.
    pub tensors: Vec<TensorInfo>,
}

impl Header {
    /// Bytes of all tensors together.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.last().map_or(0, |tensor| tensor.range.end)
    }

    /// Encodes length prefix and header, padded with spaces so that the data begins at a multiple
    /// of eight bytes, as the reference implementation writes it.
    pub fn encode(&self) -> Vec<u8> {
        #[derive(Serialize)]
        struct Entry<'a> {
            dtype: &'a str,
            shape: &'a [u64],
            data_offsets: [u64; 2],
        }
        let mut json = serde_json::Map::with_capacity(self.tensors.len() + 1);
        if !self.metadata.is_empty() {
            json.insert("__metadata__".into(), to_value(&self.metadata));
        }
        for tensor in &self.tensors {
            let entry = Entry {
                dtype: tensor.dtype.name(),
                shape: &tensor.shape,
                data_offsets: [tensor.range.start, tensor.range.end],
            };
            json.insert(tensor.name.clone(), to_value(&entry));
        }
        let mut text = serde_json::Value::Object(json).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(PREFIX as usize), b' ');
        let mut encoded = (text.len() as u64).to_le_bytes().to_vec();
        encoded.append(&mut text);
        encoded
    }
}

fn to_value(value: &impl Serialize) -> serde_json::Value {
    serde_json::to_value(value).expect("strings and integers always serialise")
}

/// An opened file: the checked header and the map of the whole file.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    map: Mmap,
    header: Header,
    data_start: u64,
    by_name: IndexMap<String, usize>,
}

impl SafetensorsFile {
    /// Opens, maps and checks a file.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened, [`Error::Checkpoint`] if it is not sound.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| Error::io(path, error))?;
        let metadata = file.metadata().map_err(|error| Error::io(path, error))?;
        let broken = |message: String| Error::checkpoint(path, message);
        if !metadata.is_file() {
            return Err(broken("is not a file; a .safetensors file is needed here".into()));
        }
        if metadata.len() < PREFIX {
            let length = metadata.len();
            return Err(broken(format!(
                "is truncated: {length} bytes are too few for a safetensors file; fetch it again"
            )));
        }
        // SAFETY: the map is read-only and private to this value. Bytes that another process
        // changes meanwhile are read as plain numbers, never as anything with validity rules; the
        // file's length was taken from the open descriptor, and readers that must survive a
        // shrinking file use `read_at` instead of the map.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::io(path, error))?;
        let beginning = read_header(&file, metadata.len()).map_err(|error| match error {
            HeaderError::Broken(message) => broken(message),
            HeaderError::Io(error) => Error::io(path, error),
        })?;
        let (header, data_start) = parse(&beginning, metadata.len()).map_err(broken)?;
        let by_name = header
            .tensors
            .iter()
            .enumerate()
            .map(|(position, tensor)| (tensor.name.clone(), position))
            .collect();
        Ok(Self { path: path.to_path_buf(), file, map, header, data_start, by_name })
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file, for positioned reads and copies in the kernel.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The checked header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes before the data: length prefix and header.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// Length prefix and header as they stand in the file.
    pub fn header_bytes(&self) -> &[u8] {
        &self.map[..self.data_start as usize]
    }

    /// The whole file's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|position| &self.header.tensors[*position])
    }

    /// A tensor's bytes in the map; not aligned to its type.
    pub fn tensor_bytes(&self, tensor: &TensorInfo) -> &[u8] {
        let start = (self.data_start + tensor.range.start) as usize;
        let end = (self.data_start + tensor.range.end) as usize;
        &self.map[start..end]
    }
}

enum HeaderError {
    Broken(String),
    Io(std::io::Error),
}

/// Length prefix and header. Read, not mapped: a file that is still being written may shrink.
fn read_header(file: &File, size: u64) -> Result<Vec<u8>, HeaderError> {
    let mut bytes = vec![0; PREFIX as usize];
    read_at(file, &mut bytes, 0).map_err(HeaderError::Io)?;
    let length = header_length(&bytes, size).map_err(HeaderError::Broken)?;
    bytes.resize((PREFIX + length) as usize, 0);
    read_at(file, &mut bytes[PREFIX as usize..], PREFIX).map_err(HeaderError::Io)?;
    Ok(bytes)
}

/// The length that the prefix gives, if a file of that size can have it.
fn header_length(bytes: &[u8], size: u64) -> Result<u64, String> {
    let prefix: [u8; 8] = bytes[..PREFIX as usize].try_into().expect("eight bytes");
    let length = u64::from_le_bytes(prefix);
    let available = size - PREFIX;
    if length > available {
        return Err(format!(
            "its header claims {length} bytes but only {available} follow: \
             the file is truncated or no safetensors file"
        ));
    }
    if length > MAXIMUM_HEADER {
        return Err(format!(
            "its header of {length} bytes is longer than the {MAXIMUM_HEADER} that safetensors allows"
        ));
    }
    Ok(length)
}

/// The header at the beginning of a file of that size.
fn parse(bytes: &[u8], size: u64) -> Result<(Header, u64), String> {
    let length = header_length(bytes, size)?;
    let text = &bytes[PREFIX as usize..(PREFIX + length) as usize];
    let raw: RawHeader = serde_json::from_slice(text)
        .map_err(|error| format!("its header is not a valid safetensors header: {error}"))?;
    let tensors = check(raw.tensors, size - PREFIX - length)?;
    Ok((Header { metadata: raw.metadata, tensors }, PREFIX + length))
}

/// Checks every entry by itself and all of them against the data; returns them in data order.
fn check(entries: IndexMap<String, RawTensor>, data: u64) -> Result<Vec<TensorInfo>, String> {
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        let [start, end] = entry.data_offsets;
        if start > end {
            return Err(format!(
                "tensor {name} begins at byte {start} and ends before it, at {end}"
            ));
        }
        let dtype = Dtype::from_name(&entry.dtype);
        let elements = entry
            .shape
            .iter()
            .try_fold(1u64, |product, extent| product.checked_mul(*extent))
            .ok_or_else(|| {
                format!("tensor {name} has a shape too large to count: {:?}", entry.shape)
            })?;
        if let Some(bits) = dtype.bits() {
            let needed = elements.checked_mul(bits).map(|total| total.div_ceil(8));
            if needed != Some(end - start) {
                let shape = &entry.shape;
                let needed = needed.map_or("too many to count".into(), |bytes| bytes.to_string());
                return Err(format!(
                    "tensor {name} of shape {shape:?} and type {dtype} needs {needed} bytes \
                     but its offsets give it {}",
                    end - start
                ));
            }
        }
        tensors.push(TensorInfo { name, dtype, shape: entry.shape, range: start..end });
    }
    tensors.sort_by(|left, right| {
        (left.range.start, left.range.end).cmp(&(right.range.start, right.range.end))
    });
    let mut position = 0;
    let mut previous = "the header";
    for tensor in &tensors {
        let name = &tensor.name;
        if tensor.range.start < position {
            return Err(format!("tensors {previous} and {name} overlap"));
        }
        if tensor.range.start > position {
            let hole = tensor.range.start - position;
            return Err(format!(
                "{hole} bytes between {previous} and tensor {name} belong to no tensor"
            ));
        }
        position = tensor.range.end;
        previous = name;
    }
    if position > data {
        return Err(format!(
            "is truncated: its header describes {position} bytes of data but the file holds {data}; \
             fetch it again"
        ));
    }
    if position < data {
        return Err(format!(
            "holds {} bytes after its last tensor, which its header does not describe",
            data - position
        ));
    }
    Ok(tensors)
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

#[derive(Default)]
struct RawHeader {
    metadata: IndexMap<String, String>,
    tensors: IndexMap<String, RawTensor>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;

        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("an object with an entry a tensor")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<RawHeader, M::Error> {
                let mut header = RawHeader::default();
                let mut metadata_seen = false;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if metadata_seen {
                            return Err(M::Error::custom("__metadata__ stands in it twice"));
                        }
                        metadata_seen = true;
                        header.metadata = map.next_value()?;
                    } else if header.tensors.contains_key(&name) {
                        map.next_value::<IgnoredAny>()?;
                        return Err(M::Error::custom(format!("tensor {name} stands in it twice")));
                    } else {
                        let tensor = map.next_value().map_err(|error| {
                            M::Error::custom(format!("the entry of tensor {name}: {error}"))
                        })?;
                        header.tensors.insert(name, tensor);
                    }
                }
                Ok(header)
            }
        }

        deserializer.deserialize_map(HeaderVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn parse_whole(bytes: &[u8]) -> Result<(Header, u64), String> {
        parse(bytes, bytes.len() as u64)
    }

    fn complaint(header: &str, data: usize) -> String {
        parse_whole(&file(header, data)).expect_err("a broken header")
    }

    #[test]
    fn a_sound_header_comes_back_in_data_order_and_encodes_to_itself() {
        let text = r#"{"__metadata__":{"format":"pt"},
            "b":{"dtype":"BF16","shape":[2,2],"data_offsets":[4,12]},
            "a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},
            "odd":{"dtype":"Q3","shape":[5],"data_offsets":[12,14]}}"#;
        let (header, start) = parse_whole(&file(text, 14)).expect("sound");
        assert_eq!(start as usize, 8 + text.len());
        let names: Vec<_> = header.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "odd"]);
        let mut encoded = header.encode();
        assert_eq!(encoded.len() % 8, 0);
        encoded.resize(encoded.len() + 14, 0);
        let (again, _) = parse_whole(&encoded).expect("sound");
        assert_eq!(again.tensors, header.tensors);
        assert_eq!(again.metadata["format"], "pt");
    }

    #[test]
    fn every_kind_of_damage_has_its_sentence() {
        let entry = |offsets: &str| {
            format!(r#"{{"x":{{"dtype":"F32","shape":[2],"data_offsets":{offsets}}}}}"#)
        };
        assert!(complaint("{", 0).contains("not a valid safetensors header"));
        assert!(complaint(&entry("[0,8]"), 7).contains("truncated"));
        assert!(complaint(&entry("[0,8]"), 9).contains("1 bytes after its last tensor"));
        assert!(complaint(&entry("[4,12]"), 12).contains("belong to no tensor"));
        assert!(complaint(&entry("[0,4]"), 4).contains("needs 8 bytes"));
        assert!(complaint(&entry("[8,0]"), 8).contains("ends before it"));
        assert!(complaint(&entry("[-8,0]"), 8).contains("the entry of tensor x"));
        let huge = r#"{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}"#;
        assert!(complaint(huge, 8).contains("too large to count"));
        let twice = r#"{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
                        "x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
        assert!(complaint(twice, 2).contains("tensor x stands in it twice"));
        let overlap = r#"{"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},
                          "y":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#;
        assert!(complaint(overlap, 3).contains("x and y overlap"));
        let mut long = file("{}", 0);
        long[0] = 200;
        assert!(parse_whole(&long).expect_err("too long").contains("claims 200 bytes but only 2"));
    }
}
