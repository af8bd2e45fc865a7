//! Tensors that are computed from others when they are read, of which nothing is held: multiples,
//! transposes, parts put together, the factors that a delta expands to.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use super::delta::{Delta, Expert};
use super::factors::{Pair, common};
use crate::error::Result;
use crate::kernel::convert::{convert, for_each_f64, widen_f64};
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::{CHUNK, Recipe, Tensor, TensorInfo};

/// Elements that are widened together.
const BLOCK: usize = 512;
/// Bytes up to which a transpose is read at once, so that its columns are no single elements.
const TURNED: u64 = 8 << 20;

/// A tensor whose values are computed when they are read, each rounded once to its type. Messages call
/// it as they call `like`, and it counts as made from `from`.
///
/// # Errors
/// As [`Tensor::computed`].
pub fn of_values<'a>(
    like: &Tensor,
    dtype: &Dtype,
    shape: Vec<u64>,
    from: impl IntoIterator<Item = &'a Tensor>,
    piece: Option<u64>,
    make: impl Fn(Range<u64>) -> Result<Vec<f64>> + Send + Sync + 'static,
) -> Result<Tensor> {
    let own = dtype.clone();
    let recipe = Recipe::new(move |elements| Ok(rounded(&own, &make(elements)?)));
    computed(like, dtype, shape, recipe.from(from).in_pieces(piece))
}

fn computed(like: &Tensor, dtype: &Dtype, shape: Vec<u64>, recipe: Recipe) -> Result<Tensor> {
    Tensor::computed(like.file().path(), like.name.clone(), dtype.clone(), shape, recipe)
}

/// The bytes of numbers in a type, each rounded once.
pub fn rounded(dtype: &Dtype, values: &[f64]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * dtype.size()];
    let mut wide = [0; 8 * BLOCK];
    for (values, target) in values.chunks(BLOCK).zip(bytes.chunks_mut(BLOCK * dtype.size())) {
        for (value, wide) in values.iter().zip(wide.chunks_exact_mut(8)) {
            wide.copy_from_slice(&value.to_le_bytes());
        }
        convert(&Dtype::F64, &wide[..8 * values.len()], dtype, target);
    }
    bytes
}

/// A tensor of numbers that are in memory, each rounded once. Messages call it as they call another.
///
/// # Errors
/// [`crate::Error::Adapter`] if they do not fit the shape.
pub fn in_memory(like: &Tensor, dtype: &Dtype, shape: Vec<u64>, values: &[f64]) -> Result<Tensor> {
    let bytes = rounded(dtype, values);
    Tensor::in_memory(like.file().path(), like.name.clone(), dtype.clone(), shape, bytes)
}

/// Each number of some bytes times another, rounded once.
fn multiplied(from: &Dtype, bytes: &[u8], factor: f64, to: &Dtype) -> Vec<u8> {
    let mut target = vec![0; bytes.len() / from.size() * to.size()];
    let mut wide = [0; 8 * BLOCK];
    let blocks = bytes.chunks(BLOCK * from.size()).zip(target.chunks_mut(BLOCK * to.size()));
    for (source, target) in blocks {
        for_each_f64(from, source, |index, value| {
            wide[index * 8..][..8].copy_from_slice(&(value * factor).to_le_bytes());
        });
        convert(&Dtype::F64, &wide[..source.len() / from.size() * 8], to, target);
    }
    target
}

/// Some of a tensor's values in f64.
///
/// # Errors
/// [`crate::Error::Adapter`] if the file changed meanwhile, [`crate::Error::Io`].
pub fn some_values(tensor: &Tensor, elements: Range<u64>) -> Result<Vec<f64>> {
    Ok(widen_f64(&tensor.dtype, &some_bytes(tensor, elements)?))
}

fn some_bytes(tensor: &Tensor, elements: Range<u64>) -> Result<Vec<u8>> {
    let size = tensor.dtype.size() as u64;
    tensor.read_range(elements.start * size..elements.end * size)
}

/// A tensor under another shape of as many elements.
pub fn reshaped(tensor: &Tensor, shape: Vec<u64>) -> Tensor {
    debug_assert_eq!(shape.iter().product::<u64>(), tensor.elements());
    Tensor::new(tensor.file().clone(), TensorInfo { shape, ..tensor.info().clone() })
}

/// Some rows of a tensor, which are read where they lie.
pub fn rows(tensor: &Tensor, rows: &Range<u64>) -> Tensor {
    let row = tensor.bytes() / tensor.shape[0].max(1);
    let start = tensor.info().range.start;
    let mut shape = tensor.shape.clone();
    shape[0] = rows.end - rows.start;
    let range = start + rows.start * row..start + rows.end * row;
    Tensor::new(tensor.file().clone(), TensorInfo { shape, range, ..tensor.info().clone() })
}

/// A tensor in another floating-point type, each value rounded once.
///
/// # Errors
/// As [`Tensor::computed`]. When it is read, what `refused` makes of a finite value that is none in
/// that type.
pub fn cast(
    tensor: &Tensor,
    dtype: &Dtype,
    refused: impl Fn() -> crate::Error + Send + Sync + 'static,
) -> Result<Tensor> {
    let (source, own) = (tensor.clone(), dtype.clone());
    let recipe = Recipe::new(move |elements| {
        let bytes = some_bytes(&source, elements)?;
        let mut target = vec![0; bytes.len() / source.dtype.size() * own.size()];
        if !convert(&source.dtype, &bytes, &own, &mut target) {
            let became = widen_f64(&own, &target);
            let mut is_lost = false;
            for_each_f64(&source.dtype, &bytes, |index, value| {
                is_lost |= value.is_finite() && !became[index].is_finite();
            });
            if is_lost {
                return Err(refused());
            }
        }
        Ok(target)
    });
    let recipe = recipe.from([tensor]).in_pieces(tensor.piece());
    computed(tensor, dtype, tensor.shape.clone(), recipe)
}

/// A tensor times a number: in its own type where that is exact, else in one of at least 32 bits.
///
/// # Errors
/// That the file changed, [`crate::Error::Io`].
pub fn times(tensor: &Tensor, factor: f64) -> Result<Tensor> {
    if factor == 1.0 {
        return Ok(tensor.clone());
    }
    let wide = common(&tensor.dtype, &Dtype::F32);
    let is_own = wide == tensor.dtype || is_exact(tensor, factor)?;
    let dtype = if is_own { tensor.dtype.clone() } else { wide };
    let (source, own) = (tensor.clone(), dtype.clone());
    let recipe = Recipe::new(move |elements| {
        Ok(multiplied(&source.dtype, &some_bytes(&source, elements)?, factor, &own))
    });
    let recipe = recipe.from([tensor]).in_pieces(tensor.piece());
    computed(tensor, &dtype, tensor.shape.clone(), recipe)
}

/// Whether a tensor's type holds the product of every value with a number.
fn is_exact(tensor: &Tensor, factor: f64) -> Result<bool> {
    let dtype = &tensor.dtype;
    let mut exact = true;
    tensor.for_each_chunk(&mut |_, bytes| {
        let products = widen_f64(dtype, &multiplied(dtype, bytes, factor, dtype));
        for_each_f64(dtype, bytes, |index, value| exact &= products[index] == value * factor);
        if exact { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    Ok(exact)
}

/// Tensors of one width below one another, in a type that holds the values of all.
///
/// # Errors
/// As [`Tensor::computed`].
///
/// # Panics
/// If there are none.
pub fn stacked(tensors: &[Tensor]) -> Result<Tensor> {
    let first = &tensors[0];
    let dtype = tensors.iter().fold(first.dtype.clone(), |all, one| common(&all, &one.dtype));
    let mut shape = first.shape.clone();
    shape[0] = tensors.iter().map(|tensor| tensor.shape[0]).sum();
    let mut piece = together(tensors, shape.iter().product());
    if piece.is_some() && tensors.iter().all(|one| one.elements() == first.elements()) {
        // Some of them whole, as many as one reads together.
        let part = first.elements().max(1);
        piece = Some((CHUNK as u64).div_ceil(part * dtype.size() as u64) * part);
    }
    let (parts, own) = (tensors.to_vec(), dtype.clone());
    let recipe = Recipe::new(move |elements| {
        let mut bytes = Vec::with_capacity((elements.end - elements.start) as usize * own.size());
        let mut start = 0;
        for part in &parts {
            let end = start + part.elements();
            let (from, to) = (elements.start.max(start), elements.end.min(end));
            if from < to {
                let stored = some_bytes(part, from - start..to - start)?;
                if part.dtype == own {
                    bytes.extend(stored);
                } else {
                    bytes.extend(multiplied(&part.dtype, &stored, 1.0, &own));
                }
            }
            start = end;
        }
        Ok(bytes)
    });
    computed(first, &dtype, shape, recipe.from(tensors).in_pieces(piece))
}

/// All elements of what is made from tensors of which one is best read in pieces.
fn together<'a>(from: impl IntoIterator<Item = &'a Tensor>, all: u64) -> Option<u64> {
    from.into_iter().any(|tensor| tensor.piece().is_some()).then_some(all)
}

/// A block of B: at these rows, or nothing.
#[derive(Debug, Clone, Copy)]
pub struct Block<'a> {
    /// Its rows.
    pub rows: u64,
    /// The factor on it, and B itself.
    pub factor: Option<(f64, &'a Tensor)>,
}

/// The block-diagonal matrix of several B, each times its number, with zeros where there is none.
///
/// # Errors
/// As [`times`].
///
/// # Panics
/// If no block has a factor.
pub fn block_diagonal(blocks: &[Block<'_>]) -> Result<Tensor> {
    struct Placed {
        row: u64,
        column: u64,
        width: u64,
        factor: Tensor,
    }
    let (_, like) = blocks.iter().find_map(|block| block.factor).expect("a module has factors");
    let mut dtype = like.dtype.clone();
    let (mut row, mut column) = (0, 0);
    let mut placed = Vec::new();
    for block in blocks {
        if let Some((factor, tensor)) = block.factor {
            let factor = times(tensor, factor)?;
            dtype = common(&dtype, &factor.dtype);
            let width = tensor.shape[1..].iter().product();
            placed.push(Placed { row, column, width, factor });
            column += width;
        }
        row += block.rows;
    }
    let (rows, rank) = (row, column);
    let from: Vec<Tensor> = placed.iter().map(|one| one.factor.clone()).collect();
    let piece = together(&from, rows * rank);
    of_values(like, &dtype, vec![rows, rank], &from, piece, move |elements| {
        let mut all = vec![0.0; (elements.end - elements.start) as usize];
        // The rows that the elements lie in, whole.
        let lines = elements.start / rank..elements.end.div_ceil(rank);
        for Placed { row, column, width, factor } in &placed {
            let (from, to) = (lines.start.max(*row), lines.end.min(row + factor.shape[0]));
            if from >= to {
                continue;
            }
            let stored = some_values(factor, (from - row) * width..(to - row) * width)?;
            for (line, stored) in (from..to).zip(stored.chunks_exact(*width as usize)) {
                let place = line * rank + column;
                let (first, last) = (place.max(elements.start), (place + width).min(elements.end));
                if first < last {
                    let own = (first - place) as usize..(last - place) as usize;
                    let target = (first - elements.start) as usize;
                    all[target..target + own.len()].copy_from_slice(&stored[own]);
                }
            }
        }
        Ok(all)
    })
}

/// The transpose of a matrix.
///
/// # Errors
/// As [`Tensor::computed`].
pub fn transposed(tensor: &Tensor) -> Result<Tensor> {
    let (rows, columns) = (tensor.shape[0], tensor.shape[1..].iter().product::<u64>());
    let size = tensor.dtype.size();
    // Of a tall matrix columns are read in runs: neighbors lie beside each other.
    let run = (64 / size as u64).min(columns) * rows;
    let piece = together([tensor], rows * columns).unwrap_or(run.min(TURNED / size as u64));
    let source = tensor.clone();
    let recipe = Recipe::new(move |elements: Range<u64>| {
        let mut bytes = vec![0; (elements.end - elements.start) as usize * size];
        let turned = elements.start / rows..elements.end.div_ceil(rows);
        let mut put = |row: u64, first: u64, stored: &[u8]| {
            for (column, value) in (first..).zip(stored.chunks_exact(size)) {
                let place = column * rows + row;
                if elements.contains(&place) {
                    let target = (place - elements.start) as usize * size;
                    bytes[target..target + size].copy_from_slice(value);
                }
            }
        };
        let width = turned.end - turned.start;
        if width * 4 >= columns || source.piece().is_some() {
            // Whole rows, in blocks.
            let block = match source.piece() {
                Some(_) => rows,
                None => ((1 << 20) / (columns * size as u64).max(1)).max(1),
            };
            for start in (0..rows).step_by(block as usize) {
                let end = rows.min(start + block);
                let stored = some_bytes(&source, start * columns..end * columns)?;
                for (row, line) in (start..end).zip(stored.chunks_exact(columns as usize * size)) {
                    let cut = turned.start as usize * size..turned.end as usize * size;
                    put(row, turned.start, &line[cut]);
                }
            }
        } else {
            for row in 0..rows {
                let start = row * columns;
                let stored = some_bytes(&source, start + turned.start..start + turned.end)?;
                put(row, turned.start, &stored);
            }
        }
        Ok(bytes)
    });
    let recipe = recipe.from([tensor]).in_pieces(Some(piece));
    computed(tensor, &tensor.dtype, vec![columns, rows], recipe)
}

/// The factors A, (rank, inputs), and B, (outputs, rank), that a delta expands to. They are expanded
/// again with each read, and best read whole.
///
/// # Errors
/// As [`Delta::pair`].
pub fn expanded(delta: &Arc<dyn Delta>, expert: Option<Expert>) -> Result<[Tensor; 2]> {
    let own = delta.clone();
    changed(delta, move || own.pair(expert, None))
}

/// The same of the factors that something makes of a delta's.
///
/// # Errors
/// Those of `make`.
pub fn changed(
    delta: &Arc<dyn Delta>,
    make: impl Fn() -> Result<Pair> + Send + Sync + 'static,
) -> Result<[Tensor; 2]> {
    let tensors = delta.tensors();
    let (like, make) = (tensors[0].1, Arc::new(make));
    let found = make()?;
    let [rank, inputs, outputs] = [found.rank, found.inputs, found.outputs].map(|one| one as u64);
    // Names tell what part a tensor plays: these are no longer the parts of what they are made from.
    let named = |tensor: Tensor, name: &str| {
        let info = TensorInfo { name: name.to_owned(), ..tensor.info().clone() };
        Tensor::new(tensor.file().clone(), info)
    };
    let factor = |dtype: &Dtype, shape: Vec<u64>, of: fn(Pair) -> Vec<u8>| {
        let (make, size) = (make.clone(), dtype.size());
        let recipe = Recipe::new(move |elements: Range<u64>| {
            let mut bytes = of(make()?);
            bytes.truncate(elements.end as usize * size);
            bytes.drain(..elements.start as usize * size);
            Ok(bytes)
        });
        let from = tensors.iter().map(|(_, tensor)| *tensor);
        let recipe = recipe.from(from).in_pieces(Some(shape.iter().product()));
        computed(like, dtype, shape, recipe)
    };
    let a = factor(&found.a_dtype, vec![rank, inputs], |pair| pair.a)?;
    let b = factor(&found.b_dtype, vec![outputs, rank], |pair| pair.b)?;
    Ok([named(a, "lora_down"), named(b, "lora_up")])
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::adapter::factors::values;

    fn tensor(dtype: &Dtype, shape: &[u64], from: f64) -> Tensor {
        let count = shape.iter().product::<u64>();
        let numbers: Vec<f64> = (0..count).map(|index| (from + index as f64 * 1.7).sin()).collect();
        let bytes = rounded(dtype, &numbers);
        Tensor::in_memory(Path::new("x"), "x", dtype.clone(), shape.to_vec(), bytes).expect("sound")
    }

    /// That a tensor reads the same in parts, in runs and whole, and what it reads.
    fn read(tensor: &Tensor) -> Vec<f64> {
        let whole = tensor.read().expect("computed");
        let all = tensor.bytes();
        for start in (0..all).step_by(7) {
            for end in [start, (start + 1).min(all), (start + 50).min(all), all] {
                let part = tensor.read_range(start..end).expect("computed");
                assert_eq!(part, whole[start as usize..end as usize], "{start}..{end}");
            }
        }
        let mut runs = Vec::new();
        let mut each = |_, bytes: &[u8]| {
            runs.extend_from_slice(bytes);
            ControlFlow::Continue(())
        };
        tensor.for_each_chunk(&mut each).expect("computed");
        assert_eq!(runs, whole);
        values(tensor).expect("computed")
    }

    /// The same as a tensor that is best read whole.
    fn together_of(tensor: &Tensor) -> Tensor {
        let own = tensor.clone();
        let recipe = Recipe::new(move |elements| some_bytes(&own, elements));
        let recipe = recipe.in_pieces(Some(tensor.elements()));
        computed(tensor, &tensor.dtype, tensor.shape.clone(), recipe).expect("sound")
    }

    #[test]
    fn a_product_with_a_number_keeps_its_type_where_that_is_exact() {
        for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32, Dtype::F64] {
            let stored = tensor(&dtype, &[20, 33], 0.3);
            for factor in [1.0, 0.5, -4.0, 0.3, 1.0 / 3.0] {
                for source in [stored.clone(), together_of(&stored)] {
                    let product = times(&source, factor).expect("computed");
                    let is_power = f64::abs(factor).log2().fract() == 0.0;
                    let wide = if is_power { dtype.clone() } else { common(&dtype, &Dtype::F32) };
                    assert_eq!(product.dtype, wide, "{dtype} {factor}");
                    let expected: Vec<f64> =
                        values(&stored).expect("read").iter().map(|value| value * factor).collect();
                    let expected = widen_f64(&wide, &rounded(&wide, &expected));
                    assert_eq!(read(&product), expected, "{dtype} {factor}");
                }
            }
        }
        // A power of two that leaves the range of the type.
        let stored = tensor(&Dtype::F16, &[4], 0.3);
        assert_eq!(times(&stored, 1e6f64.log2().exp2()).expect("computed").dtype, Dtype::F32);
        assert_eq!(times(&stored, 2f64.powi(-20)).expect("computed").dtype, Dtype::F32);
    }

    #[test]
    fn parts_are_put_together_as_matrices() {
        let [one, two] = [tensor(&Dtype::F32, &[5, 3], 0.1), tensor(&Dtype::F16, &[4, 3], 0.2)];
        let stack = stacked(&[one.clone(), together_of(&two)]).expect("computed");
        assert_eq!((&stack.dtype, stack.shape.as_slice()), (&Dtype::F32, [9, 3].as_slice()));
        let expected = [values(&one).expect("read"), values(&two).expect("read")].concat();
        assert_eq!(read(&stack), expected);
        assert_eq!(read(&rows(&stack, &(3..7))), expected[9..21]);
        for whole in [false, true] {
            let two = if whole { together_of(&two) } else { two.clone() };
            let blocks = [
                Block { rows: 5, factor: Some((1.0, &one)) },
                Block { rows: 2, factor: None },
                Block { rows: 4, factor: Some((0.7, &two)) },
            ];
            let matrix = block_diagonal(&blocks).expect("computed");
            assert_eq!(matrix.shape, [11, 6]);
            let mut expected = vec![0.0; 66];
            for (index, value) in values(&one).expect("read").into_iter().enumerate() {
                expected[index / 3 * 6 + index % 3] = value;
            }
            for (index, value) in values(&two).expect("read").into_iter().enumerate() {
                expected[(index / 3 + 7) * 6 + index % 3 + 3] = f64::from((value * 0.7) as f32);
            }
            assert_eq!(read(&matrix), expected);
        }
    }

    #[test]
    fn a_transpose_has_columns_for_rows_however_tall_it_is() {
        for (height, width) in [(1u64, 1u64), (3, 50), (50, 3), (700, 90), (2, 3000), (9000, 40)] {
            let stored = tensor(&Dtype::Bf16, &[height, width], 0.4);
            let all = values(&stored).expect("read");
            let expected: Vec<f64> = (0..width as usize)
                .flat_map(|column| (0..height as usize).map(move |row| (row, column)))
                .map(|(row, column)| all[row * width as usize + column])
                .collect();
            for source in [stored.clone(), together_of(&stored)] {
                let turned = transposed(&source).expect("computed");
                assert_eq!(turned.shape, [width, height]);
                assert!(values(&turned).expect("computed") == expected, "{height} {width}");
                assert!(values(&transposed(&turned).expect("computed")).expect("computed") == all);
            }
        }
        read(&transposed(&tensor(&Dtype::F32, &[30, 20], 0.4)).expect("computed"));
    }

    #[test]
    fn a_cast_is_refused_where_a_finite_value_becomes_infinite_and_nowhere_else() {
        let of = |numbers: &[f64]| {
            let bytes = rounded(&Dtype::F32, numbers);
            let shape = vec![numbers.len() as u64];
            let stored = Tensor::in_memory(Path::new("x"), "x", Dtype::F32, shape, bytes);
            let refused = || crate::Error::Argument("too large".to_owned());
            cast(&stored.expect("sound"), &Dtype::F16, refused).expect("computed")
        };
        assert_eq!(read(&of(&[1.5, f64::INFINITY])), [1.5, f64::INFINITY]);
        for numbers in [&[1.5, 1e6][..], &[f64::INFINITY, 1e6]] {
            let error = of(numbers).read().expect_err("too large");
            assert_eq!(error.to_string(), "too large");
        }
    }
}
