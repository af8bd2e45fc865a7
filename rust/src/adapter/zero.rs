//! Updates of nothing: modules whose s·B·A is zero, and why.

use std::ops::ControlFlow;

use indexmap::IndexMap;

use super::factors::Pair;
use super::{Adapter, Expert, Module};
use crate::error::{Result, agree, counted};
use crate::kernel::convert::widen_f64;
use crate::tensor::safetensors::Tensor;

/// Why an update is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ZeroCause {
    /// Its scale is.
    Scale,
    /// A tensor that is a factor of it is; which, in words.
    Tensor(&'static str),
    /// No tensor is, but their product.
    Product,
}

impl ZeroCause {
    /// What is zero, in words.
    pub fn describe(self) -> String {
        match self {
            Self::Scale => "the scale is 0".to_owned(),
            Self::Tensor("the second factor") => "the second factor (B) is all zero".to_owned(),
            Self::Tensor("the first factor") => "the first factor (A) is all zero".to_owned(),
            Self::Tensor(what) => format!("{what} is all zero"),
            Self::Product => "the product of the factors is zero, though neither is".to_owned(),
        }
    }
}

/// Columns of A of which products are looked at.
const COLUMNS: u64 = 8;
/// Rows of B among which one is looked for that is not zero.
const ROWS: u64 = 16;
/// Multiples and increments of the generator of the vectors that a product is applied to: Knuth's.
const MULTIPLIER: u64 = 6_364_136_223_846_793_005;
const INCREMENT: u64 = 1_442_695_040_888_963_407;

/// Why a module of an adapter changes nothing; `None` where it changes something, be it by what it
/// does beside its product.
///
/// # Errors
/// [`crate::Error::Adapter`] if a file changed meanwhile, [`crate::Error::Io`].
pub fn cause(adapter: &Adapter, module: &Module) -> Result<Option<ZeroCause>> {
    if does_more(adapter, module)? {
        return Ok(None);
    }
    if module.scaling == 0.0 {
        return Ok(Some(ZeroCause::Scale));
    }
    for (what, tensor) in module.product_tensors() {
        // An alpha that is an integer; one of zero is refused.
        if !tensor.dtype.is_mergeable() {
            continue;
        }
        if is_all_zero(tensor)? {
            return Ok(Some(ZeroCause::Tensor(what)));
        }
    }
    // A few rows nearly always tell; all is read of what they do not tell of.
    if let Some((a, b)) = module.delta.plain() {
        if tells(a, b)? {
            return Ok(None);
        }
    } else {
        for expert in module.products() {
            let Factors { extents, b, a } = module.delta.leading(expert, ROWS)?.into();
            if is_beyond_zero(extents, &|index| b[index], &|index| a[index]) {
                return Ok(None);
            }
        }
    }
    for expert in module.products() {
        let Factors { extents, b, a } = module.pair(expert, None, None)?.into();
        if !vanishes(extents, &|index| b[index], &|index| a[index]) {
            return Ok(None);
        }
    }
    Ok(Some(ZeroCause::Product))
}

/// The same of one of a module's products: the only one, or an expert's.
///
/// # Errors
/// As [`cause`].
pub fn cause_of_product(
    adapter: &Adapter,
    module: &Module,
    expert: Option<Expert>,
) -> Result<Option<ZeroCause>> {
    if expert.is_none() {
        return cause(adapter, module);
    }
    if does_more(adapter, module)? {
        return Ok(None);
    }
    if module.scaling == 0.0 {
        return Ok(Some(ZeroCause::Scale));
    }
    let Factors { extents, b, a } = module.pair(expert, None, None)?.into();
    let is_zero = |values: &[f64]| values.iter().all(|value| *value == 0.0);
    let parts = module.delta.tensors();
    for ((what, _), values) in parts.iter().zip([&a, &b]) {
        if is_zero(values) {
            return Ok(Some(ZeroCause::Tensor(what)));
        }
    }
    let vanishes = vanishes(extents, &|index| b[index], &|index| a[index]);
    Ok(vanishes.then_some(ZeroCause::Product))
}

/// Whether headers alone tell that a module changes nothing, as its scale is zero.
pub fn is_told_by_headers(adapter: &Adapter, module: &Module) -> bool {
    module.scaling == 0.0
        && module.magnitude.is_none()
        && !adapter.semantics().initialization.takes_out(module.scaling)
}

/// Whether a module changes the base beside adding its product: by a DoRA magnitude, by a bias, or as
/// its start took components out of the base's weight, whatever is added to what is left.
fn does_more(adapter: &Adapter, module: &Module) -> Result<bool> {
    let start = adapter.semantics().initialization;
    if module.magnitude.is_some()
        || module.delta.transform().is_some()
        || start.takes_out(module.scaling)
    {
        return Ok(true);
    }
    // A bias has the product's scale.
    let bias = module.bias.as_ref().filter(|_| module.scaling != 0.0);
    bias.map_or(Ok(false), |bias| Ok(!is_all_zero(bias)?))
}

/// The factors of one product in numbers.
struct Factors {
    /// Outputs, inputs and the rank.
    extents: [usize; 3],
    b: Vec<f64>,
    a: Vec<f64>,
}

impl From<Pair> for Factors {
    fn from(pair: Pair) -> Self {
        Self {
            extents: [pair.outputs, pair.inputs, pair.rank],
            b: widen_f64(&pair.b_dtype, &pair.b),
            a: widen_f64(&pair.a_dtype, &pair.a),
        }
    }
}

/// Whether nothing that an adapter holds changes anything.
///
/// # Errors
/// As [`cause`].
pub fn changes_nothing(adapter: &Adapter) -> Result<bool> {
    if !adapter.saved().is_empty() || !adapter.trained_rows().is_empty() {
        return Ok(false);
    }
    for module in adapter.modules().values() {
        if cause(adapter, module)?.is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What a person should know of an adapter's updates that are zero.
///
/// # Errors
/// As [`cause`].
pub fn warnings(adapter: &Adapter) -> Result<Vec<String>> {
    let mut causes = IndexMap::<ZeroCause, Vec<&str>>::new();
    for module in adapter.modules().values() {
        if let Some(cause) = cause(adapter, module)? {
            causes.entry(cause).or_default().push(&module.path);
        }
    }
    let warning = |(cause, paths): (ZeroCause, Vec<&str>)| {
        // As before the first step of training.
        let untrained = cause == ZeroCause::Tensor("the second factor");
        format!(
            "{}: {}{} in {} of {} (the first: {}); {} {}{} nothing",
            adapter.path().display(),
            cause.describe(),
            if cause == ZeroCause::Product { "," } else { "" },
            paths.len(),
            counted(adapter.modules().len(), "module"),
            paths[0],
            agree(paths.len(), "it", "they"),
            match (untrained, paths.len()) {
                (false, _) => "",
                (true, 1) => "was never trained and ",
                (true, _) => "were never trained and ",
            },
            agree(paths.len(), "changes", "change"),
        )
    };
    Ok(causes.into_iter().map(warning).collect())
}

/// Whether a few elements of the product tell already that it is not zero, as they nearly always do.
fn tells(a: &Tensor, b: &Tensor) -> Result<bool> {
    let (rank, inputs) = (a.shape[0], a.shape[1..].iter().product::<u64>());
    let rows = b.read_rows(rank, &(0..b.shape[0].min(ROWS)))?;
    let rows = widen_f64(&b.dtype, &rows);
    let mut rows = rows.chunks_exact(rank as usize);
    let Some(row) = rows.find(|row| row.iter().any(|value| *value != 0.0)) else {
        return Ok(false);
    };
    let size = a.dtype.size() as u64;
    let mut beginning = vec![0; (inputs.min(COLUMNS) * size) as usize];
    let mut sums = vec![(0.0, 0.0); inputs.min(COLUMNS) as usize];
    for (k, factor) in row.iter().enumerate().filter(|(_, factor)| **factor != 0.0) {
        a.read_into(k as u64 * inputs * size, &mut beginning)?;
        let values = widen_f64(&a.dtype, &beginning);
        for ((sum, bound), value) in sums.iter_mut().zip(values) {
            *sum += factor * value;
            *bound += f64::abs(factor * value);
        }
    }
    Ok(sums.iter().any(|(sum, bound)| is_beyond_rounding(*sum, rank as usize, *bound)))
}

/// Whether nothing but rounding is left of a product of (outputs, inputs, rank), whose factors are
/// given by the position of each element, row after row: it takes vectors of random numbers to zero.
pub fn vanishes(
    [outputs, inputs, rank]: [usize; 3],
    b: &dyn Fn(usize) -> f64,
    a: &dyn Fn(usize) -> f64,
) -> bool {
    if is_beyond_zero([outputs, inputs, rank], b, a) {
        return false;
    }
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT);
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    for _ in 0..2 {
        let vector: Vec<f64> = (0..inputs).map(|_| random()).collect();
        let terms =
            |k: usize| vector.iter().enumerate().map(move |(column, x)| a(k * inputs + column) * x);
        let middle: Vec<(f64, f64)> =
            (0..rank).map(|k| (terms(k).sum(), terms(k).map(f64::abs).sum())).collect();
        for row in 0..outputs {
            let terms = middle.iter().enumerate().map(|(k, term)| (b(row * rank + k), term));
            let (sum, bound) = terms.fold((0.0, 0.0), |(sum, bound), (x, (value, size))| {
                (sum + x * value, bound + (x * size).abs())
            });
            if is_beyond_rounding(sum, inputs + rank, bound) {
                return false;
            }
        }
    }
    true
}

/// Whether a few elements of a product tell already that it is not zero, as they nearly always do.
fn is_beyond_zero(
    [outputs, inputs, rank]: [usize; 3],
    b: &dyn Fn(usize) -> f64,
    a: &dyn Fn(usize) -> f64,
) -> bool {
    let rows = 0..outputs.min(ROWS as usize);
    let Some(row) = rows.into_iter().find(|row| (0..rank).any(|k| b(row * rank + k) != 0.0)) else {
        return false;
    };
    (0..inputs.min(COLUMNS as usize)).any(|column| {
        let terms = (0..rank).map(|k| b(row * rank + k) * a(k * inputs + column));
        let (sum, bound) =
            terms.fold((0.0, 0.0), |(sum, bound), term| (sum + term, bound + f64::abs(term)));
        is_beyond_rounding(sum, rank, bound)
    })
}

/// Whether a sum of so many terms, whose sizes add up to `bound`, is more than rounding may have made
/// of zero (Higham, "Accuracy and Stability of Numerical Algorithms", §3.1), or no number.
fn is_beyond_rounding(sum: f64, terms: usize, bound: f64) -> bool {
    sum.is_nan() || f64::abs(sum) > terms as f64 * f64::EPSILON * bound
}

/// Whether every element of a tensor is zero.
fn is_all_zero(tensor: &Tensor) -> Result<bool> {
    let size = tensor.dtype.size();
    // Zero but for the sign, which is the highest bit of the last byte.
    let is_zero = |element: &[u8]| {
        element[size - 1] & 0x7f == 0 && element[..size - 1].iter().all(|byte| *byte == 0)
    };
    // One of the first elements nearly always tells.
    let mut beginning = [0; 64];
    let beginning = &mut beginning[..tensor.bytes().min(64) as usize];
    tensor.read_into(0, beginning)?;
    let mut all_zero = beginning.chunks_exact(size).all(is_zero);
    if all_zero {
        tensor.for_each_chunk(&mut |_, bytes| {
            all_zero = bytes.chunks_exact(size).all(is_zero);
            if all_zero { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
    }
    Ok(all_zero)
}
