//! Parsing of a GGUF header, piece by piece, each held against what is left of the file.

use std::collections::HashSet;
use std::io;

use indexmap::IndexMap;
use serde_json::Value;

use super::{ALIGNMENT, DEFAULT_ALIGNMENT};
use crate::storage::source::Source;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::{Header, TensorInfo};

/// What a file begins with.
pub const MAGIC: &[u8; 4] = b"GGUF";
/// The longest header that is read: as of safetensors files, and beyond any adapter's.
const MAXIMUM_HEADER: u64 = 100_000_000;
/// The most metadata entries.
const MAXIMUM_ENTRIES: u64 = 1 << 16;
/// The most tensors.
const MAXIMUM_TENSORS: u64 = 1 << 20;
/// The most extents of a tensor: ggml's own limit.
const MAXIMUM_EXTENTS: u32 = 4;
/// The largest alignment.
const MAXIMUM_ALIGNMENT: u64 = 1 << 20;
/// The longest array whose values are kept.
const KEPT_VALUES: u64 = 64;
/// Arrays within arrays.
const DEPTH: u32 = 4;
/// Bytes that are read together.
const CHUNK: u64 = 64 << 10;

/// Types that are no metadata of their own but of factors: those that are named in messages, by
/// ggml's numbers.
const OTHER_TYPES: [(u32, &str); 29] = [
    (2, "Q4_0"),
    (3, "Q4_1"),
    (6, "Q5_0"),
    (7, "Q5_1"),
    (8, "Q8_0"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (12, "Q4_K"),
    (13, "Q5_K"),
    (14, "Q6_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

/// Why a header was not read.
#[derive(Debug)]
pub(super) enum Fault {
    /// It is not sound, in words.
    Broken(String),
    /// The system refused.
    Unread(io::Error),
}

impl From<String> for Fault {
    fn from(message: String) -> Self {
        Self::Broken(message)
    }
}

/// A header that was read.
pub(super) struct Parsed {
    pub metadata: IndexMap<String, Value>,
    pub header: Header,
    pub data_start: u64,
}

/// The header of a whole file.
pub(super) fn parse(source: &dyn Source) -> Result<Parsed, Fault> {
    let mut cursor = Cursor::new(source);
    let Counts { tensors, entries } = cursor.counts()?;
    let mut metadata = IndexMap::new();
    for _ in 0..entries {
        let (key, value) = cursor.entry()?;
        if metadata.contains_key(&key) {
            return Err(format!("its metadata has {key} twice").into());
        }
        metadata.insert(key, value);
    }
    let alignment = alignment(&metadata)?;
    let mut found = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..tensors {
        let tensor = cursor.tensor()?;
        if !names.insert(tensor.name.clone()) {
            return Err(format!("tensor {} stands in it twice", tensor.name).into());
        }
        if !tensor.range.start.is_multiple_of(alignment) {
            return Err(format!(
                "tensor {} begins at byte {} of the data, no multiple of the alignment {alignment}",
                tensor.name, tensor.range.start
            )
            .into());
        }
        found.push(tensor);
    }
    let data_start = cursor.position.next_multiple_of(alignment);
    let data = cursor.size.saturating_sub(data_start);
    found.sort_by_key(|tensor| (tensor.range.start, tensor.range.end));
    let (mut end, mut previous) = (0, "the header");
    for tensor in &found {
        let name = &tensor.name;
        if tensor.range.start < end {
            return Err(format!("tensors {previous} and {name} overlap").into());
        }
        (end, previous) = (tensor.range.end, name);
    }
    if end > data {
        return Err(format!(
            "is truncated: its header describes {end} bytes of data but the file holds {data}; \
             fetch it again"
        )
        .into());
    }
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let texts = metadata.iter().map(|(key, value)| (key.clone(), text(value))).collect();
    Ok(Parsed { header: Header { metadata: texts, tensors: found }, metadata, data_start })
}

/// One entry of the metadata; `None` if there is none of that key.
pub(super) fn entry(source: &dyn Source, wanted: &str) -> Result<Option<Value>, Fault> {
    let mut cursor = Cursor::new(source);
    for _ in 0..cursor.counts()?.entries {
        let (key, value) = cursor.entry()?;
        if key == wanted {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

fn alignment(metadata: &IndexMap<String, Value>) -> Result<u64, Fault> {
    let Some(value) = metadata.get(ALIGNMENT) else { return Ok(DEFAULT_ALIGNMENT) };
    let found = value.as_u64().filter(|found| found.is_power_of_two());
    found.filter(|found| *found <= MAXIMUM_ALIGNMENT).ok_or_else(|| {
        format!("its {ALIGNMENT} is {value}; it is a power of two up to {MAXIMUM_ALIGNMENT}").into()
    })
}

/// How many tensors and entries a header says that it has.
struct Counts {
    tensors: u64,
    entries: u64,
}

/// A place in the header.
struct Cursor<'a> {
    source: &'a dyn Source,
    size: u64,
    position: u64,
    buffer: Vec<u8>,
    buffer_start: u64,
}

impl<'a> Cursor<'a> {
    fn new(source: &'a dyn Source) -> Self {
        let size = source.stamp().length;
        Self { source, size, position: 0, buffer: Vec::new(), buffer_start: 0 }
    }

    /// Refuses to go on by more bytes than there are, or than a header has.
    fn check(&self, count: u64) -> Result<(), Fault> {
        let left = self.size - self.position;
        if count > left {
            return Err(format!(
                "its header claims {count} bytes where {left} are left: the file is truncated or \
                 damaged; fetch it again"
            )
            .into());
        }
        if self.position + count > MAXIMUM_HEADER {
            return Err(format!("its header is longer than {MAXIMUM_HEADER} bytes").into());
        }
        Ok(())
    }

    fn skip(&mut self, count: u64) -> Result<(), Fault> {
        self.check(count)?;
        self.position += count;
        Ok(())
    }

    fn take(&mut self, count: u64) -> Result<&[u8], Fault> {
        self.check(count)?;
        let end = self.position + count;
        let is_held = self.position >= self.buffer_start
            && end <= self.buffer_start + self.buffer.len() as u64;
        if !is_held {
            let length = count.max(CHUNK).min(self.size - self.position);
            self.buffer.resize(length as usize, 0);
            self.source.read_at(&mut self.buffer, self.position).map_err(Fault::Unread)?;
            self.buffer_start = self.position;
        }
        let start = (self.position - self.buffer_start) as usize;
        self.position = end;
        Ok(&self.buffer[start..start + count as usize])
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        Ok(self.take(N as u64)?.try_into().expect("as many as were asked for"))
    }

    fn u32(&mut self) -> Result<u32, Fault> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Fault> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<String, Fault> {
        let length = self.u64()?;
        let bytes = self.take(length)?.to_vec();
        String::from_utf8(bytes).map_err(|error| {
            let text = String::from_utf8_lossy(error.as_bytes()).into_owned();
            format!("its header has a text that is no UTF-8 ({text:?})").into()
        })
    }

    fn counts(&mut self) -> Result<Counts, Fault> {
        if self.size < 24 {
            let size = self.size;
            return Err(format!(
                "is truncated: {size} bytes are too few for a GGUF file; fetch it again"
            )
            .into());
        }
        if self.take(4)? != MAGIC {
            return Err("is no GGUF file".to_owned().into());
        }
        let version = self.u32()?;
        match version {
            2 | 3 => {}
            1 => {
                return Err(
                    "is a GGUF file of version 1, which llama.cpp reads no longer; make it \
                            again from what it was made from"
                        .to_owned()
                        .into(),
                );
            }
            _ if version & 0xffff == 0 => {
                return Err("is a GGUF file of a big-endian machine; write it in little-endian \
                            order (gguf-py's gguf_convert_endian)"
                    .to_owned()
                    .into());
            }
            _ => {
                return Err(format!(
                    "is a GGUF file of version {version}; versions 2 and 3 can be read"
                )
                .into());
            }
        }
        let (tensors, entries) = (self.u64()?, self.u64()?);
        for (what, count, most) in
            [("tensors", tensors, MAXIMUM_TENSORS), ("metadata entries", entries, MAXIMUM_ENTRIES)]
        {
            if count > most {
                return Err(format!("its header claims {count} {what}; {most} are the most").into());
            }
        }
        Ok(Counts { tensors, entries })
    }

    fn entry(&mut self) -> Result<(String, Value), Fault> {
        let key = self.text()?;
        let kind = self.u32()?;
        let value = self.value(kind, &key, 0)?;
        Ok((key, value))
    }

    fn value(&mut self, kind: u32, key: &str, depth: u32) -> Result<Value, Fault> {
        let number = |value: f64| match serde_json::Number::from_f64(value) {
            Some(number) => Value::Number(number),
            None => Value::String(value.to_string()),
        };
        Ok(match kind {
            0 => self.bytes().map(u8::from_le_bytes)?.into(),
            1 => self.bytes().map(i8::from_le_bytes)?.into(),
            2 => self.bytes().map(u16::from_le_bytes)?.into(),
            3 => self.bytes().map(i16::from_le_bytes)?.into(),
            4 => self.u32()?.into(),
            5 => self.bytes().map(i32::from_le_bytes)?.into(),
            6 => number(self.bytes().map(f32::from_le_bytes)?.into()),
            7 => (self.bytes::<1>()?[0] != 0).into(),
            8 => self.text()?.into(),
            9 => self.array(key, depth)?,
            10 => self.u64()?.into(),
            11 => self.bytes().map(i64::from_le_bytes)?.into(),
            12 => number(self.bytes().map(f64::from_le_bytes)?),
            other => {
                return Err(format!("its metadata has {key} of the unknown type {other}").into());
            }
        })
    }

    /// An array; of a long one, that it is one.
    fn array(&mut self, key: &str, depth: u32) -> Result<Value, Fault> {
        if depth == DEPTH {
            return Err(format!("its metadata has {key} of arrays within arrays").into());
        }
        let (kind, count) = (self.u32()?, self.u64()?);
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            // The least that one takes.
            8 => 8,
            _ => 12,
        };
        let least = count.checked_mul(size).ok_or_else(|| {
            Fault::Broken(format!("its metadata has {key}, an array of {count} values"))
        })?;
        self.check(least)?;
        if count <= KEPT_VALUES {
            let values = (0..count).map(|_| self.value(kind, key, depth + 1));
            return values.collect::<Result<Vec<_>, _>>().map(Value::Array);
        }
        match kind {
            0..=7 | 10..=12 => self.skip(least)?,
            8 => {
                for _ in 0..count {
                    let length = self.u64()?;
                    self.skip(length)?;
                }
            }
            _ => {
                for _ in 0..count {
                    self.value(kind, key, depth + 1)?;
                }
            }
        }
        Ok(format!("an array of {count} values").into())
    }

    fn tensor(&mut self) -> Result<TensorInfo, Fault> {
        let name = self.text()?;
        let extents = self.u32()?;
        if extents > MAXIMUM_EXTENTS {
            return Err(format!(
                "tensor {name} has {extents} extents; {MAXIMUM_EXTENTS} are the most"
            )
            .into());
        }
        let mut shape = (0..extents).map(|_| self.u64()).collect::<Result<Vec<_>, _>>()?;
        // The fastest comes first in the file.
        shape.reverse();
        let (kind, start) = (self.u32()?, self.u64()?);
        let dtype = match kind {
            0 => Dtype::F32,
            1 => Dtype::F16,
            28 => Dtype::F64,
            30 => Dtype::Bf16,
            other => {
                let known = OTHER_TYPES.iter().find(|(number, _)| *number == other);
                let name =
                    known.map_or_else(|| format!("type {other}"), |(_, name)| (*name).into());
                Dtype::Other(name.into())
            }
        };
        let elements = shape.iter().try_fold(1u64, |all, extent| all.checked_mul(*extent));
        let bits = if dtype.is_mergeable() { dtype.size() as u64 } else { 0 };
        let end = elements.and_then(|count| count.checked_mul(bits)?.checked_add(start));
        let Some(end) = end else {
            return Err(format!("tensor {name} has a shape too large to count: {shape:?}").into());
        };
        Ok(TensorInfo { name, dtype, shape, range: start..end })
    }
}
