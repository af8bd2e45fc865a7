//! Elements of a tensor as they lie in a file, and their order-preserving integer keys.

use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::kernel::vector::vectorized;
use crate::tensor::dtype::Dtype;

/// The type of a tensor's elements, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// One byte, zero or not.
    Bool,
    /// Unsigned, 8 bits.
    U8,
    /// Signed, 8 bits.
    I8,
    /// Unsigned, 16 bits.
    U16,
    /// Signed, 16 bits.
    I16,
    /// Unsigned, 32 bits.
    U32,
    /// Signed, 32 bits.
    I32,
    /// Unsigned, 64 bits; rounded to f64 above 2⁵³.
    U64,
    /// Signed, 64 bits; rounded to f64 above 2⁵³.
    I64,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    BF16,
    /// IEEE binary32.
    F32,
    /// IEEE binary64.
    F64,
}

impl ElementType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::Bool | Self::U8 | Self::I8 => 1,
            Self::U16 | Self::I16 | Self::F16 | Self::BF16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// The element type of a safetensors dtype; `None` for those without statistics (complex
    /// numbers, 8-bit floats, packed types).
    pub fn from_dtype(dtype: &Dtype) -> Option<Self> {
        Some(match dtype.name() {
            "BOOL" => Self::Bool,
            "U8" => Self::U8,
            "I8" => Self::I8,
            "U16" => Self::U16,
            "I16" => Self::I16,
            "U32" => Self::U32,
            "I32" => Self::I32,
            "U64" => Self::U64,
            "I64" => Self::I64,
            "F16" => Self::F16,
            "BF16" => Self::BF16,
            "F32" => Self::F32,
            "F64" => Self::F64,
            _ => return None,
        })
    }

    /// The narrowest floating-point format that holds every value of the type (up to the
    /// rounding of 64-bit integers).
    pub(crate) const fn format(self) -> Format {
        match self {
            Self::F16 => Format::Half,
            Self::BF16 => Format::Brain,
            Self::Bool | Self::U8 | Self::I8 | Self::U16 | Self::I16 | Self::F32 => Format::Single,
            Self::U32 | Self::I32 | Self::U64 | Self::I64 | Self::F64 => Format::Double,
        }
    }
}

/// A tensor's elements: raw little-endian bytes at any alignment, and their type.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    bytes: &'a [u8],
    element: ElementType,
}

impl<'a> Tensor<'a> {
    /// A view of `bytes` as elements.
    ///
    /// # Errors
    /// [`Error::Argument`] when `bytes` does not hold a whole number of elements.
    pub fn new(bytes: &'a [u8], element: ElementType) -> Result<Self> {
        if !bytes.len().is_multiple_of(element.size()) {
            return Err(Error::Argument(format!(
                "{} bytes are not a whole number of {element:?} elements",
                bytes.len()
            )));
        }
        Ok(Self { bytes, element })
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.element.size()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The elements' type.
    pub fn element(&self) -> ElementType {
        self.element
    }

    /// The elements as they lie in the file.
    pub(super) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Elements `start..end`.
    pub(crate) fn slice(&self, start: usize, end: usize) -> Self {
        let size = self.element.size();
        Self { bytes: &self.bytes[start * size..end * size], element: self.element }
    }

    /// Every element as f64, into `output` of the same length.
    pub(crate) fn decode(&self, output: &mut [f64]) {
        decode(self.bytes, self.element, output);
    }

    /// [`Tensor::decode`] for any number of elements.
    pub(crate) fn decode_long(&self, output: &mut [f64]) {
        for (index, part) in output.chunks_mut(BLOCK).enumerate() {
            let start = index * BLOCK;
            self.slice(start, start + part.len()).decode(part);
        }
    }

    /// Every element's key in `format`, which must hold the element type's values.
    pub(crate) fn keys(&self, format: Format, output: &mut [u64]) {
        keys(self.bytes, self.element, format, output);
    }

    /// The upper 16 bits of every element's key in `format`.
    pub(crate) fn buckets(&self, format: Format, output: &mut [u16]) {
        buckets(self.bytes, self.element, format, output);
    }
}

/// The most elements that one call of [`Tensor::decode`], [`Tensor::keys`] or
/// [`Tensor::buckets`] takes, so that the buffers stay in the first-level cache.
pub(crate) const BLOCK: usize = 2048;

/// Reads every `N` bytes of `bytes` as an element, converts it, and stores it.
#[inline(always)]
fn each<const N: usize, T>(bytes: &[u8], output: &mut [T], convert: impl Fn([u8; N]) -> T) {
    let (elements, _) = bytes.as_chunks::<N>();
    for (target, &source) in output.iter_mut().zip(elements) {
        *target = convert(source);
    }
}

vectorized! {
    fn decode(bytes: &[u8], element: ElementType, output: &mut [f64]) {
        match element {
            ElementType::Bool => each(bytes, output, |b: [u8; 1]| f64::from(u8::from(b[0] != 0))),
            ElementType::U8 => each(bytes, output, |b: [u8; 1]| f64::from(b[0])),
            ElementType::I8 => each(bytes, output, |b| f64::from(i8::from_le_bytes(b))),
            ElementType::U16 => each(bytes, output, |b| f64::from(u16::from_le_bytes(b))),
            ElementType::I16 => each(bytes, output, |b| f64::from(i16::from_le_bytes(b))),
            ElementType::U32 => each(bytes, output, |b| f64::from(u32::from_le_bytes(b))),
            ElementType::I32 => each(bytes, output, |b| f64::from(i32::from_le_bytes(b))),
            ElementType::U64 => each(bytes, output, |b| u64::from_le_bytes(b) as f64),
            ElementType::I64 => each(bytes, output, |b| i64::from_le_bytes(b) as f64),
            ElementType::F16 => super::halves::widen(bytes, output),
            ElementType::BF16 => each(bytes, output, |b| {
                f64::from(f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16))
            }),
            ElementType::F32 => each(bytes, output, |b| f64::from(f32::from_le_bytes(b))),
            ElementType::F64 => each(bytes, output, f64::from_le_bytes),
        }
    }
}

vectorized! {
    fn buckets(bytes: &[u8], element: ElementType, format: Format, output: &mut [u16]) {
        match (element, format) {
            (ElementType::F16, Format::Half) | (ElementType::BF16, Format::Brain) => {
                each(bytes, output, |b| order16(u16::from_le_bytes(b)));
            }
            (ElementType::F32, Format::Single) => {
                each(bytes, output, |b| (order32(u32::from_le_bytes(b)) >> 16) as u16);
            }
            _ => {
                let mut wide = [0u64; BLOCK];
                let wide = &mut wide[..output.len()];
                keys(bytes, element, format, wide);
                let shift = format.width() - 16;
                for (target, &source) in output.iter_mut().zip(wide.iter()) {
                    *target = (source >> shift) as u16;
                }
            }
        }
    }
}

vectorized! {
    fn keys(bytes: &[u8], element: ElementType, format: Format, output: &mut [u64]) {
        match (element, format) {
            (ElementType::F16, Format::Half) | (ElementType::BF16, Format::Brain) => {
                each(bytes, output, |b| u64::from(order16(u16::from_le_bytes(b))));
            }
            (ElementType::F32, Format::Single) => {
                each(bytes, output, |b| u64::from(order32(u32::from_le_bytes(b))));
            }
            (_, Format::Single) => {
                // Exact: whatever is keyed as Single fits f32.
                let mut wide = [0f64; BLOCK];
                let wide = &mut wide[..output.len()];
                decode(bytes, element, wide);
                for (target, &source) in output.iter_mut().zip(wide.iter()) {
                    *target = u64::from(order32((source as f32).to_bits()));
                }
            }
            _ => {
                let mut wide = [0f64; BLOCK];
                let wide = &mut wide[..output.len()];
                decode(bytes, element, wide);
                for (target, &source) in output.iter_mut().zip(wide.iter()) {
                    *target = order64(source.to_bits());
                }
            }
        }
    }
}

#[inline(always)]
fn order16(bits: u16) -> u16 {
    bits ^ (((bits as i16 >> 15) as u16) | 0x8000)
}

#[inline(always)]
fn order32(bits: u32) -> u32 {
    bits ^ (((bits as i32 >> 31) as u32) | 0x8000_0000)
}

#[inline(always)]
fn order64(bits: u64) -> u64 {
    bits ^ (((bits as i64 >> 63) as u64) | (1 << 63))
}

/// A floating-point format whose values, as unsigned keys, sort as the numbers do: negative NaN,
/// −∞, …, −0, +0, …, +∞, positive NaN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Half,
    Brain,
    Single,
    Double,
}

impl Format {
    /// The narrowest format that holds both formats' values.
    pub(crate) fn join(self, other: Self) -> Self {
        match (self, other) {
            _ if self == other => self,
            (Self::Double, _) | (_, Self::Double) => Self::Double,
            _ => Self::Single,
        }
    }

    /// Bits of a key.
    pub(crate) const fn width(self) -> u32 {
        match self {
            Self::Half | Self::Brain => 16,
            Self::Single => 32,
            Self::Double => 64,
        }
    }

    const fn sign(self) -> u64 {
        1 << (self.width() - 1)
    }

    /// The key of +0.
    pub(crate) const fn zero(self) -> u64 {
        self.sign()
    }

    /// The key of +∞: one past the largest finite key.
    pub(crate) const fn infinity(self) -> u64 {
        self.sign()
            | match self {
                Self::Half => 0x7c00,
                Self::Brain => 0x7f80,
                Self::Single => 0x7f80_0000,
                Self::Double => 0x7ff0_0000_0000_0000,
            }
    }

    /// The key of the negative number.
    pub(crate) const fn negate(self, key: u64) -> u64 {
        !key & (u64::MAX >> (64 - self.width()))
    }

    /// The key of the least finite number.
    pub(crate) const fn least(self) -> u64 {
        self.negate(self.infinity()) + 1
    }

    /// The number that has this key.
    pub(crate) fn value(self, key: u64) -> f64 {
        let magnitude_bits =
            if key & self.sign() == 0 { self.negate(key) } else { key } & !self.sign();
        let magnitude = match self {
            Self::Half => f64::from(f16::from_bits(magnitude_bits as u16)),
            Self::Brain => f64::from(bf16::from_bits(magnitude_bits as u16)),
            Self::Single => f64::from(f32::from_bits(magnitude_bits as u32)),
            Self::Double => f64::from_bits(magnitude_bits),
        };
        if key & self.sign() == 0 { -magnitude } else { magnitude }
    }

    /// The key of the nearest number of the format to one that is not NaN; infinity's key beyond.
    pub(crate) fn key(self, value: f64) -> u64 {
        match self {
            Self::Half => u64::from(order16(f16::from_f64(value).to_bits())),
            Self::Brain => u64::from(order16(bf16::from_f64(value).to_bits())),
            Self::Single => u64::from(order32((value as f32).to_bits())),
            Self::Double => order64(value.to_bits()),
        }
    }

    /// The first key in `low..high` whose number satisfies a predicate that turns from false to
    /// true once; `high` where none does.
    pub(crate) fn first(self, low: u64, high: u64, predicate: impl Fn(f64) -> bool) -> u64 {
        let (mut low, mut high) = (low, high);
        while low < high {
            let middle = low + (high - low) / 2;
            if predicate(self.value(middle)) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        low
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_as_numbers_and_decode_to_them() {
        let numbers = [-3.0e4, -1.5, -1e-3, -6.0e-8, -0.0, 0.0, 6.0e-8, 0.25, 1.0, 65504.0];
        for format in [Format::Half, Format::Brain, Format::Single, Format::Double] {
            let mut previous = format.least() - 1;
            for &number in &numbers {
                let (bytes, element, rounded) = match format {
                    Format::Half => {
                        let half = f16::from_f64(number);
                        (half.to_le_bytes().to_vec(), ElementType::F16, half.to_f64())
                    }
                    Format::Brain => {
                        let half = bf16::from_f64(number);
                        (half.to_le_bytes().to_vec(), ElementType::BF16, half.to_f64())
                    }
                    Format::Single => (
                        (number as f32).to_le_bytes().to_vec(),
                        ElementType::F32,
                        f64::from(number as f32),
                    ),
                    Format::Double => (number.to_le_bytes().to_vec(), ElementType::F64, number),
                };
                let tensor = Tensor::new(&bytes, element).unwrap();
                let mut key = [0];
                tensor.keys(format, &mut key);
                let mut bucket = [0];
                tensor.buckets(format, &mut bucket);
                assert!(key[0] > previous, "{format:?} {number}");
                assert_eq!(format.value(key[0]).to_bits(), rounded.to_bits());
                assert_eq!(format.key(number), key[0]);
                assert_eq!(u64::from(bucket[0]), key[0] >> (format.width() - 16));
                previous = key[0];
            }
            assert!(previous < format.infinity());
            assert_eq!(format.value(format.infinity()), f64::INFINITY);
            assert_eq!(format.value(format.least() - 1), f64::NEG_INFINITY);
        }
    }

    #[test]
    fn integers_widen_by_value() {
        let check = |bytes: &[u8], element, expected: &[f64]| {
            let mut output = vec![0.0; expected.len()];
            Tensor::new(bytes, element).unwrap().decode(&mut output);
            assert_eq!(output, expected, "{element:?}");
        };
        check(&[0, 1, 7], ElementType::Bool, &[0.0, 1.0, 1.0]);
        check(&[0, 255], ElementType::U8, &[0.0, 255.0]);
        check(&[255, 127], ElementType::I8, &[-1.0, 127.0]);
        check(&[255, 255], ElementType::I16, &[-1.0]);
        check(&[255, 255], ElementType::U16, &[65535.0]);
        check(&(-5i32).to_le_bytes(), ElementType::I32, &[-5.0]);
        check(&u32::MAX.to_le_bytes(), ElementType::U32, &[4294967295.0]);
        check(&(-5i64).to_le_bytes(), ElementType::I64, &[-5.0]);
        check(&u64::MAX.to_le_bytes(), ElementType::U64, &[18446744073709551615.0]);
        check(&[0x00, 0x3c, 0x00, 0xfc], ElementType::F16, &[1.0, f64::NEG_INFINITY]);
    }

    #[test]
    fn half_an_element_is_refused() {
        assert!(Tensor::new(&[0; 6], ElementType::F32).is_err());
    }
}
