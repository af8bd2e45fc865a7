//! The header of a safetensors file, checked before anything is trusted.
//!
//! The format is eight bytes of little-endian header length, a JSON header, and the data, which
//! the tensors fill without holes. The `safetensors` crate reads it too, but keeps the last of two
//! entries of one name and reports most damage as one bare word; here each kind of damage has its
//! sentence, and types that this version does not know pass through.
//!
//! A header of 100 MB has a million tensors or more, so an entry is parsed straight into what stays
//! of it, and no name is held twice.

use std::borrow::Cow;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;

use hashbrown::HashTable;
use indexmap::IndexMap;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};

use crate::tensor::dtype::Dtype;

/// Bytes of the header length that every file begins with.
pub(super) const PREFIX: u64 = 8;
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

    /// What is wrong with weights that were saved under DeepSpeed's ZeRO-3 without being gathered:
    /// each process has a part of them, and what stands for them in the module has the shape [0].
    pub fn left_empty(&self) -> Option<String> {
        // Biases and tables of quantized layers can be empty for other reasons.
        let is_weight = |name: &str| name.ends_with(".weight") || name.contains(".lora_");
        let is_left = |tensor: &&TensorInfo| tensor.shape == [0] && is_weight(&tensor.name);
        let first = self.tensors.iter().find(is_left)?;
        Some(format!(
            "holds no values in {} of its {} tensors (the first: {}, of shape [0]): it was saved under \
             DeepSpeed's ZeRO-3, which splits weights over processes, without gathering them; save it \
             again with stage3_gather_16bit_weights_on_model_save, or make it from the training's \
             checkpoint with zero_to_fp32.py",
            self.tensors.iter().filter(is_left).count(),
            self.tensors.len(),
            first.name
        ))
    }

    /// Encodes length prefix and header, padded with spaces so that the data begins at a multiple
    /// of eight bytes, as the reference implementation writes it.
    pub fn encode(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec(&Entries(self)).expect("strings and integers serialise");
        text.resize(text.len().next_multiple_of(PREFIX as usize), b' ');
        let mut encoded = (text.len() as u64).to_le_bytes().to_vec();
        encoded.append(&mut text);
        encoded
    }
}

/// The header as one JSON object.
struct Entries<'a>(&'a Header);

impl Serialize for Entries<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Entry<'a> {
            dtype: &'a str,
            shape: &'a [u64],
            data_offsets: [u64; 2],
        }
        let mut map = serializer.serialize_map(None)?;
        if !self.0.metadata.is_empty() {
            map.serialize_entry("__metadata__", &self.0.metadata)?;
        }
        for tensor in &self.0.tensors {
            let entry = Entry {
                dtype: tensor.dtype.name(),
                shape: &tensor.shape,
                data_offsets: [tensor.range.start, tensor.range.end],
            };
            map.serialize_entry(&tensor.name, &entry)?;
        }
        map.end()
    }
}

/// The positions of tensors by their names, which are held by the tensors alone.
#[derive(Debug, Default)]
pub(super) struct Positions {
    table: HashTable<u32>,
    state: RandomState,
}

impl Positions {
    /// Those of tensors in this order.
    pub fn of(tensors: &[TensorInfo]) -> Self {
        let mut positions = Self::default();
        positions.table.reserve(tensors.len(), |_| unreachable!("it is empty"));
        (0..tensors.len()).for_each(|position| positions.insert(position, tensors));
        positions
    }

    fn insert(&mut self, position: usize, tensors: &[TensorInfo]) {
        let hash = |position: u32| self.state.hash_one(&tensors[position as usize].name);
        // A header's bytes, of which an entry has several, are fewer than 2³².
        let position = u32::try_from(position).expect("a header has fewer entries");
        self.table.insert_unique(hash(position), position, |other| hash(*other));
    }

    /// The position of the tensor of that name.
    pub fn find(&self, name: &str, tensors: &[TensorInfo]) -> Option<usize> {
        let is_it = |position: &u32| tensors[*position as usize].name == name;
        self.table.find(self.state.hash_one(name), is_it).map(|position| *position as usize)
    }
}

/// A header that was read.
#[derive(Debug)]
pub(super) struct Parsed {
    pub header: Header,
    pub positions: Positions,
}

/// The length that the prefix gives, if a file of that size can have it.
pub(super) fn length(bytes: &[u8], size: u64) -> Result<u64, String> {
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
pub(super) fn parse(bytes: &[u8], size: u64) -> Result<Parsed, String> {
    let length = length(bytes, size)?;
    let text = &bytes[PREFIX as usize..(PREFIX + length) as usize];
    let RawHeader { metadata, mut tensors, mut positions } = serde_json::from_slice(text)
        .map_err(|error| format!("its header is not a valid safetensors header: {error}"))?;
    tensors.iter().try_for_each(check)?;
    let place = |tensor: &TensorInfo| (tensor.range.start, tensor.range.end);
    if !tensors.is_sorted_by_key(place) {
        tensors.sort_by_key(place);
        positions = Positions::of(&tensors);
    }
    check_layout(&tensors, size - PREFIX - length)?;
    Ok(Parsed { header: Header { metadata, tensors }, positions })
}

/// Checks an entry by itself.
fn check(tensor: &TensorInfo) -> Result<(), String> {
    let TensorInfo { name, dtype, shape, range } = tensor;
    let Range { start, end } = range;
    if start > end {
        return Err(format!("tensor {name} begins at byte {start} and ends before it, at {end}"));
    }
    let elements = shape
        .iter()
        .try_fold(1u64, |product, extent| product.checked_mul(*extent))
        .ok_or_else(|| format!("tensor {name} has a shape too large to count: {shape:?}"))?;
    let Some(bits) = dtype.bits() else { return Ok(()) };
    let needed = elements.checked_mul(bits).map(|total| total.div_ceil(8));
    if needed == Some(end - start) {
        return Ok(());
    }
    let needed = needed.map_or("too many to count".into(), |bytes| bytes.to_string());
    Err(format!(
        "tensor {name} of shape {shape:?} and type {dtype} needs {needed} bytes \
         but its offsets give it {}",
        end - start
    ))
}

/// Checks all entries, in the order of their data, against each other and the data.
fn check_layout(tensors: &[TensorInfo], data: u64) -> Result<(), String> {
    let mut position = 0;
    let mut previous = "the header";
    for tensor in tensors {
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
    Ok(())
}

#[derive(Deserialize)]
struct RawTensor<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// A header before its entries are checked, in the order of the text.
#[derive(Default)]
struct RawHeader {
    metadata: IndexMap<String, String>,
    tensors: Vec<TensorInfo>,
    positions: Positions,
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
                // Names of types without a variant of their own are allocated once, not for each
                // tensor.
                let mut dtype = Dtype::F32;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if metadata_seen {
                            return Err(M::Error::custom("__metadata__ stands in it twice"));
                        }
                        metadata_seen = true;
                        // mlx writes null where there is none, which the reference reads as well.
                        header.metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
                        continue;
                    }
                    if header.positions.find(&name, &header.tensors).is_some() {
                        map.next_value::<IgnoredAny>()?;
                        return Err(M::Error::custom(format!("tensor {name} stands in it twice")));
                    }
                    let entry: RawTensor<'_> = map.next_value().map_err(|error| {
                        M::Error::custom(format!("the entry of tensor {name}: {error}"))
                    })?;
                    if dtype.name() != entry.dtype {
                        dtype = Dtype::from_name(&entry.dtype);
                    }
                    let [start, end] = entry.data_offsets;
                    let (dtype, shape) = (dtype.clone(), entry.shape);
                    header.tensors.push(TensorInfo { name, dtype, shape, range: start..end });
                    header.positions.insert(header.tensors.len() - 1, &header.tensors);
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

    fn parse_whole(bytes: &[u8]) -> Result<Header, String> {
        parse(bytes, bytes.len() as u64).map(|parsed| parsed.header)
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
        let header = parse_whole(&file(text, 14)).expect("sound");
        let names: Vec<_> = header.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "odd"]);
        let mut encoded = header.encode();
        assert_eq!(encoded.len() % 8, 0);
        encoded.resize(encoded.len() + 14, 0);
        let again = parse_whole(&encoded).expect("sound");
        assert_eq!(again.tensors, header.tensors);
        assert_eq!(again.metadata["format"], "pt");
    }

    #[test]
    fn a_tensor_is_found_by_its_name_whatever_the_order_of_the_header() {
        for reversed in [false, true] {
            let mut order: Vec<usize> = (0..1000).collect();
            if reversed {
                order.reverse();
            }
            let entries: Vec<String> = order
                .iter()
                .map(|at| {
                    let end = at + 1;
                    format!(r#""t{at}":{{"dtype":"U8","shape":[1],"data_offsets":[{at},{end}]}}"#)
                })
                .collect();
            let bytes = file(&format!("{{{}}}", entries.join(",")), 1000);
            let Parsed { header, positions, .. } =
                parse(&bytes, bytes.len() as u64).expect("sound");
            for at in order {
                assert_eq!(positions.find(&format!("t{at}"), &header.tensors), Some(at));
            }
            assert_eq!(positions.find("t1000", &header.tensors), None);
        }
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
