//! Rectangular parts of a tensor, as runs of its bytes.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::tensor::safetensors::TensorInfo;

/// A part of a tensor: a range of every dimension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// What is selected, from the outermost level to the innermost, which is counted in bytes.
    /// Dimensions that lie whole within a level are part of it.
    levels: Vec<Level>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Level {
    extent: usize,
    range: Range<usize>,
}

impl Selection {
    /// All of a tensor of so many bytes.
    pub fn whole(bytes: usize) -> Self {
        Self { levels: vec![Level { extent: bytes, range: 0..bytes }] }
    }

    /// A range of each dimension of a tensor.
    ///
    /// # Errors
    /// [`Error::Argument`] for ranges that are not the tensor's, for parts of a type whose size is
    /// not known, and for parts that begin or end within a byte.
    pub fn new(tensor: &TensorInfo, ranges: &[Range<u64>]) -> Result<Self> {
        let name = &tensor.name;
        let within =
            |(range, extent): (&Range<u64>, &u64)| range.start <= range.end && range.end <= *extent;
        if ranges.len() != tensor.shape.len() || !ranges.iter().zip(&tensor.shape).all(within) {
            return Err(Error::Argument(format!(
                "the part {ranges:?} is none of {name}, whose shape is {:?}",
                tensor.shape
            )));
        }
        let Some(bits) = tensor.dtype.bits() else {
            return Err(Error::Argument(format!(
                "{name} has elements of type {}, whose size is not known here; only all of it can \
                 be had",
                tensor.dtype
            )));
        };
        let mut inner = Level { extent: bits as usize, range: 0..bits as usize };
        let mut outer = Vec::new();
        for (range, extent) in ranges.iter().zip(&tensor.shape).rev() {
            let (extent, range) = (*extent as usize, range.start as usize..range.end as usize);
            if inner.range == (0..inner.extent) {
                let unit = inner.extent;
                inner.extent = extent * unit;
                inner.range = range.start * unit..range.end * unit;
            } else {
                outer.push(std::mem::replace(&mut inner, Level { extent, range }));
            }
        }
        outer.push(inner);
        outer.reverse();
        let last = outer.last_mut().expect("there is one at least");
        if [last.extent, last.range.start, last.range.end].iter().any(|bits| bits % 8 != 0) {
            return Err(Error::Argument(format!(
                "the part {ranges:?} of {name} begins or ends within a byte: its elements have \
                 {bits} bits"
            )));
        }
        last.extent /= 8;
        last.range = last.range.start / 8..last.range.end / 8;
        Ok(Self { levels: outer })
    }

    /// Bytes of the part.
    pub fn bytes(&self) -> usize {
        self.levels.iter().map(|level| level.range.len()).product()
    }

    /// Whether it is the whole tensor, or one run of its bytes.
    pub fn is_run(&self) -> bool {
        self.levels.len() == 1
    }

    /// The tensor's bytes from the first to the last that belong to it.
    pub fn span(&self) -> Range<usize> {
        if self.bytes() == 0 {
            return 0..0;
        }
        let (mut first, mut last, mut stride) = (0, 0, 1);
        for level in self.levels.iter().rev() {
            first += level.range.start * stride;
            last += (level.range.end - 1) * stride;
            stride *= level.extent;
        }
        first..last + 1
    }

    /// Shows every run of selected bytes within some of the tensor's, with its place in the part.
    fn runs(&self, within: &Range<usize>, mut each: impl FnMut(Range<usize>, usize)) {
        let (inner, outer) = self.levels.split_last().expect("there is one at least");
        if within.is_empty() || inner.range.is_empty() {
            return;
        }
        for line in within.start / inner.extent..within.end.div_ceil(inner.extent) {
            let Some(position) = position(outer, line) else { continue };
            let first = line * inner.extent + inner.range.start;
            let start = first.max(within.start);
            let end = (first + inner.range.len()).min(within.end);
            if start < end {
                each(start..end, position * inner.range.len() + (start - first));
            }
        }
    }

    /// Where in the part those of some bytes of the tensor lie that belong to it: in one piece, since
    /// both are in the same order.
    pub fn target_of(&self, within: &Range<usize>) -> Range<usize> {
        let mut target: Option<Range<usize>> = None;
        self.runs(within, |run, place| {
            let start = target.as_ref().map_or(place, |target| target.start);
            target = Some(start..place + run.len());
        });
        target.unwrap_or(0..0)
    }

    /// Copies those of the tensor's bytes, which begin at `first` in it, that belong to the part.
    /// `target` is what [`Selection::target_of`] said.
    pub fn copy(&self, first: usize, bytes: &[u8], target: &mut [u8]) {
        let mut begin = None;
        self.runs(&(first..first + bytes.len()), |run, place| {
            let begin = *begin.get_or_insert(place);
            let place = place - begin..place - begin + run.len();
            target[place].copy_from_slice(&bytes[run.start - first..run.end - first]);
        });
    }
}

/// The place of a line among those that are selected, from its number among all.
fn position(outer: &[Level], mut line: usize) -> Option<usize> {
    let (mut place, mut stride) = (0, 1);
    for level in outer.iter().rev() {
        let index = line % level.extent;
        if !level.range.contains(&index) {
            return None;
        }
        place += (index - level.range.start) * stride;
        stride *= level.range.len();
        line /= level.extent;
    }
    Some(place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::dtype::Dtype;

    fn tensor(dtype: &str, shape: &[u64]) -> TensorInfo {
        TensorInfo {
            name: "t".into(),
            dtype: Dtype::from_name(dtype),
            shape: shape.to_vec(),
            range: 0..0,
        }
    }

    /// Every part of a tensor, put together of pieces of its bytes that are cut anywhere.
    #[test]
    fn a_part_is_the_same_in_pieces_of_any_size() {
        let shape = [3u64, 4, 2, 5];
        let info = tensor("I16", &shape);
        let all: Vec<u8> = (0..240u8).collect();
        let element = |index: [u64; 4]| {
            let place =
                index.iter().zip(shape).fold(0, |sum, (index, extent)| sum * extent + index);
            [2 * place as u8, 2 * place as u8 + 1]
        };
        let parts = [
            [0..3, 0..4, 0..2, 0..5],
            [1..2, 0..4, 0..2, 0..5],
            [1..3, 1..3, 0..2, 0..5],
            [0..3, 0..4, 1..2, 0..5],
            [0..2, 3..4, 0..1, 2..4],
            [2..3, 0..4, 0..2, 4..5],
            [1..1, 0..4, 0..2, 0..5],
            [0..3, 0..4, 0..2, 3..3],
        ];
        for part in parts {
            let selection = Selection::new(&info, &part).unwrap();
            let mut expected = Vec::new();
            for a in part[0].clone() {
                for b in part[1].clone() {
                    for c in part[2].clone() {
                        part[3].clone().for_each(|d| expected.extend(element([a, b, c, d])));
                    }
                }
            }
            assert_eq!(selection.bytes(), expected.len());
            let span = selection.span();
            assert!(expected.is_empty() || span.start == usize::from(expected[0]));
            assert_eq!(span.end, expected.last().map_or(0, |last| usize::from(*last) + 1));
            for size in [1, 2, 7, 40, 240] {
                let mut found = vec![0; selection.bytes()];
                let mut filled = 0;
                for start in (0..240).step_by(size) {
                    let piece = start..240.min(start + size);
                    let target = selection.target_of(&piece);
                    if !target.is_empty() {
                        assert_eq!(target.start, filled);
                        filled = target.end;
                    }
                    selection.copy(piece.start, &all[piece], &mut found[target]);
                }
                assert_eq!(found, expected, "{part:?} in pieces of {size}");
            }
        }
    }

    #[test]
    fn half_bytes_and_unknown_types_are_had_whole_or_refused() {
        let info = tensor("F4", &[3, 4]);
        assert_eq!(Selection::new(&info, &[0..3, 0..4]).unwrap(), Selection::whole(6));
        assert_eq!(Selection::new(&info, &[1..2, 0..4]).unwrap().span(), 2..4);
        assert_eq!(Selection::new(&info, &[1..3, 2..4]).unwrap().bytes(), 2);
        let message = Selection::new(&info, &[0..3, 1..4]).unwrap_err().to_string();
        assert!(message.contains("within a byte"), "{message}");
        let message =
            Selection::new(&tensor("X9", &[3, 1]), &[0..3, 0..1]).unwrap_err().to_string();
        assert!(message.contains("not known"), "{message}");
        let message = Selection::new(&info, &[0..3, 0..5]).unwrap_err().to_string();
        assert!(message.contains("[3, 4]"), "{message}");
    }

    #[test]
    fn numbers_and_empty_tensors_have_parts() {
        assert_eq!(Selection::new(&tensor("F32", &[]), &[]).unwrap(), Selection::whole(4));
        let empty = Selection::new(&tensor("F32", &[0, 3]), &[0..0, 1..2]).unwrap();
        assert_eq!((empty.bytes(), empty.span()), (0, 0..0));
        assert_eq!(empty.target_of(&(0..0)), 0..0);
    }
}
