//! Factors read from their files, in the number type and the order that products want.

use super::collection::{Member, Piece, Source, Stored, Weights};
use crate::adapter::zero;
use crate::error::{Owner, Result};
use crate::kernel::convert::widen_f64;
use crate::kernel::vector::vectorized;
use crate::kernel::{InstructionSet, convert};
use crate::linalg::Multiply;
use crate::measure::spectrum::{Update, Values};
use crate::storage::local::read_at;
use crate::tensor::dtype::Dtype;

/// Largest magnitudes beyond 2 to this power, up or down, are brought to one before they are
/// multiplied, so that no product of four factors leaves the range of f32.
const EXTREME: i32 = 24;

/// The number type that products are summed in.
pub(super) trait Real:
    Multiply + Send + Sync + Default + bytemuck::Zeroable + 'static
{
    fn from_f32(value: f32) -> Self;
    fn from_f64(value: f64) -> Self;
    fn to_f64(self) -> f64;

    /// Σ xᵢyᵢ in f64.
    fn dot(x: &[Self], y: &[Self]) -> f64;
}

macro_rules! real {
    ($type:ty, $dot:path) => {
        impl Real for $type {
            fn from_f32(value: f32) -> Self {
                value as $type
            }

            fn from_f64(value: f64) -> Self {
                value as $type
            }

            fn to_f64(self) -> f64 {
                f64::from(self)
            }

            fn dot(x: &[Self], y: &[Self]) -> f64 {
                $dot(x, y)
            }
        }
    };
}

real!(f32, super::tiles::dot_f32);
real!(f64, super::tiles::dot_f64);

/// Stored values, widened.
enum Wide {
    Single(Vec<f32>),
    Double(Vec<f64>),
}

impl Wide {
    fn of(dtype: &Dtype, bytes: &[u8]) -> Self {
        if *dtype == Dtype::F64 {
            return Self::Double(widen_f64(dtype, bytes));
        }
        let mut values = vec![0.0f32; bytes.len() / dtype.size()];
        let set = InstructionSet::detect();
        // What is not finite stays so, and makes the figures NaN.
        let _ = convert(set, dtype, bytes, &Dtype::F32, bytemuck::cast_slice_mut(&mut values));
        Self::Single(values)
    }

    /// The values as numbers of one type times a power of two, and what they are to be multiplied
    /// by: 1 but for values that are extremely large or small.
    fn into_numbers<T: Real>(self) -> (Vec<T>, f64) {
        let largest = match &self {
            Self::Single(values) => f64::from(largest_magnitude(values)),
            Self::Double(values) => values.iter().fold(0.0f64, |most, value| most.max(value.abs())),
        };
        let exponent = if largest > 0.0 { largest.log2().floor() as i32 } else { 0 };
        let is_extreme = largest.is_finite() && exponent.abs() > EXTREME;
        if !is_extreme {
            let numbers = match self {
                Self::Single(values) => values.into_iter().map(T::from_f32).collect(),
                Self::Double(values) => values.into_iter().map(T::from_f64).collect(),
            };
            return (numbers, 1.0);
        }
        // Twice half the way: 2^-exponent of a subnormal would be infinite.
        let half = 2f64.powi(-exponent / 2);
        let rest = 2f64.powi(-exponent + exponent / 2);
        let shift = |value: f64| T::from_f64(value * half * rest);
        let numbers = match self {
            Self::Single(values) => values.into_iter().map(|value| shift(value.into())).collect(),
            Self::Double(values) => values.into_iter().map(shift).collect(),
        };
        (numbers, 2f64.powi(exponent))
    }
}

vectorized! {
    /// max|x|, whatever is no number left out.
    fn largest_magnitude(values: &[f32]) -> f32 {
        let mut most = [0.0f32; 32];
        let (blocks, rest) = values.as_chunks::<32>();
        for block in blocks {
            for (most, value) in most.iter_mut().zip(block) {
                let magnitude = value.abs();
                *most = if magnitude > *most { magnitude } else { *most };
            }
        }
        most.iter().chain(rest).fold(0.0, |most, value| most.max(value.abs()))
    }
}

/// One adapter's factors of one module, row-major: B (m, r) and A (r, n).
pub(super) struct Factors<T> {
    pub b: Vec<T>,
    pub a: Vec<T>,
    /// s, times what was taken out of extreme factors.
    pub scale: f64,
}

impl<T: Copy> Factors<T> {
    /// Those of the part of the product that a piece is.
    fn part(self, piece: &Piece) -> Self {
        let rank = piece.rank.max(1);
        let (mut b, a) = match piece.is_transposed {
            false => (self.b, self.a),
            true => (transposed(&self.a, rank), transposed(&self.b, self.b.len() / rank)),
        };
        if let Some(rows) = &piece.outputs {
            b = b[rows.start * rank..rows.end * rank].to_vec();
        }
        Self { b, a, scale: self.scale }
    }
}

/// The transpose of a row-major matrix of so many rows.
fn transposed<T: Copy>(matrix: &[T], rows: usize) -> Vec<T> {
    let columns = matrix.len() / rows.max(1);
    (0..columns)
        .flat_map(|column| (0..rows).map(move |row| matrix[row * columns + column]))
        .collect()
}

impl Factors<f64> {
    /// The update that they make.
    ///
    /// # Errors
    /// [`Error::Argument`] never: the shapes were read with the factors.
    pub fn update(&self, rows: usize, columns: usize, rank: usize) -> Result<Update<'_>> {
        let (left, right) = (Values::F64(&self.b), Values::F64(&self.a));
        Update::new(rows, columns, rank, left, right, self.scale)
    }
}

/// A member's factors, read one after another from one opening of its file.
pub(super) struct Reader<'a> {
    member: &'a Member,
    weights: Weights,
}

impl<'a> Reader<'a> {
    pub fn new(member: &'a Member) -> Result<Self> {
        Ok(Self { member, weights: member.open_weights()? })
    }

    pub fn factors<T: Real>(&self, piece: &Piece) -> Result<Factors<T>> {
        let (b, a) = match &piece.source {
            Source::Plain { a, b } => (self.wide(b)?, self.wide(a)?),
            Source::Composed { .. } => self.composed(piece)?,
        };
        // At once, for what comes of them may be kept for the next run.
        self.member.check_unchanged(&self.weights)?;
        let (b, left) = b.into_numbers();
        let (a, right) = a.into_numbers();
        let rank = piece.rank.max(1);
        let shape = [b.len() / rank, a.len() / rank, piece.rank];
        let (of_b, of_a): (&[T], &[T]) = (&b, &a);
        // What rounding would leave of a product that is zero has no direction.
        let is_zero =
            zero::vanishes(shape, &|index| of_b[index].to_f64(), &|index| of_a[index].to_f64());
        let scale = if is_zero { 0.0 } else { piece.scale * left * right };
        Ok(Factors { b, a, scale }.part(piece))
    }

    fn wide(&self, stored: &Stored) -> Result<Wide> {
        let mut bytes = vec![0; stored.length];
        self.read(&mut bytes, stored.offset)?;
        Ok(Wide::of(&stored.dtype, &bytes))
    }

    fn read(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        match &self.weights {
            Weights::File(file) => read_at(file, bytes, offset)
                .map_err(|error| Owner::Adapter.unread(&self.member.file, error)),
            Weights::Memory(file) => file.read_raw(offset, bytes),
        }
    }

    fn composed(&self, piece: &Piece) -> Result<(Wide, Wide)> {
        let Source::Composed { key, expert } = &piece.source else {
            unreachable!("a plain product is read as it stands");
        };
        let adapter = self.member.open()?;
        let Some(module) = adapter.modules().get(key) else { return Err(self.member.changed()) };
        let pair = module.pair(*expert, None, None)?;
        if pair.rank != piece.rank {
            return Err(self.member.changed());
        }
        Ok((Wide::of(&pair.b_dtype, &pair.b), Wide::of(&pair.a_dtype, &pair.a)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_magnitude_is_found_wherever_it_stands() {
        for length in [1, 31, 32, 33, 100] {
            for place in 0..length {
                let mut values = vec![0.5f32; length];
                values[place] = -3.0;
                values[length / 2] = if place == length / 2 { -3.0 } else { f32::NAN };
                assert_eq!(largest_magnitude(&values), 3.0, "{place} of {length}");
            }
        }
        assert_eq!(largest_magnitude(&[]), 0.0);
        assert_eq!(largest_magnitude(&[1.0, f32::NEG_INFINITY]), f32::INFINITY);
    }
}
