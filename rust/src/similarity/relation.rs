//! The relation of two adapters' whole updates, without cancellation, which tells whether they are
//! one update.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::Serialize;

use super::collection::{Collection, Member, Piece};
use super::load::Reader;
use super::signature::numerical_rank;
use crate::adapter::Adapter;
use crate::adapter::alignment::MemberNames;
use crate::error::Result;
use crate::measure::overlap::{difference_norm, inner_product};
use crate::measure::spectrum::{Term, Update, Values, decompose_update, frobenius_norm, values_of};
use crate::parallel::task::Task;
use crate::tensor::safetensors::Tensor;

/// What stands between two updates X and Y. All norms are Frobenius norms of whole updates;
/// modules that only one of them has are zero in the other.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Relation {
    /// ⟨X, Y⟩/(‖X‖·‖Y‖); NaN where one is zero.
    pub cosine: f64,
    /// ‖X‖ and ‖Y‖.
    pub norms: [f64; 2],
    /// ‖X − Y‖.
    pub difference: f64,
    /// c for which ‖Y − c·X‖ is least.
    pub factor: f64,
    /// ‖Y − c·X‖ for that c.
    pub scaled_difference: f64,
    /// c for which c·X_k has the norm of Y, where X_k is X with no more singular values in each
    /// module than Y has; `None` where Y has no fewer.
    pub truncation_factor: Option<f64>,
    /// ‖Y − c·X_k‖ for that c.
    pub truncation_difference: Option<f64>,
    /// ‖X_k‖²/‖X‖².
    pub kept: Option<f64>,
    /// What the two do beside low-rank updates and not alike, in words; `None` where it is the
    /// same.
    pub other_difference: Option<String>,
}

/// A module of either adapter, with their pieces.
type Pair<'a> = (Option<&'a Piece>, Option<&'a Piece>);

/// Relates two members of a collection.
///
/// # Errors
/// [`crate::Error::Io`], and [`crate::Error::Adapter`] for a file that was changed meanwhile.
pub fn relation(collection: &Collection, x: usize, y: usize) -> Result<Relation> {
    let both = Both::new(collection, x, y)?;
    let mut sums = [0.0f64; 4];
    let (mut kept, mut is_shorter) = (0.0, false);
    both.for_each(|x, y| {
        let [product, x_square, y_square, difference] = &mut sums;
        *x_square += frobenius_norm(x).powi(2);
        *y_square += frobenius_norm(y).powi(2);
        *product += inner_product(x, y)?;
        *difference += difference_norm(x, y)?.powi(2);
        let values = values_of(x);
        let count = numerical_rank(&values_of(y));
        is_shorter |= count > 0 && count < numerical_rank(&values);
        kept += values.iter().take(count).map(|value| value * value).sum::<f64>();
        Ok(())
    })?;
    let [product, x_square, y_square, difference] = sums;
    let factor = product / x_square;
    let truncation = (is_shorter && kept > 0.0).then(|| (y_square / kept).sqrt());
    let (mut scaled, mut truncated) = (0.0, 0.0);
    both.for_each(|x, y| {
        scaled += difference_norm(y, &x.scaled(factor))?.powi(2);
        if let Some(factor) = truncation {
            truncated += truncation_difference(x, y, factor)?.powi(2);
        }
        Ok(())
    })?;
    let norms = [x_square.sqrt(), y_square.sqrt()];
    Ok(Relation {
        cosine: (product / norms[0] / norms[1]).clamp(-1.0, 1.0),
        norms,
        difference: difference.sqrt(),
        factor,
        scaled_difference: scaled.sqrt(),
        truncation_factor: truncation,
        truncation_difference: truncation.map(|_| truncated.sqrt()),
        kept: truncation.map(|_| kept / x_square),
        other_difference: other_difference(&collection.members[x], &collection.members[y])?,
    })
}

/// [`relation`] of each of some pairs, on the given threads. Progress is counted in pairs.
///
/// # Errors
/// Those of [`relation`], and [`crate::Error::Cancelled`].
pub fn relations(
    collection: &Collection,
    pairs: &[(usize, usize)],
    pool: &rayon::ThreadPool,
    task: &Task,
) -> Result<Vec<Relation>> {
    task.expect(pairs.len() as u64);
    pool.install(|| {
        pairs
            .par_iter()
            .map(|(x, y)| {
                task.check()?;
                let relation = relation(collection, *x, *y)?;
                task.advance(1);
                Ok(relation)
            })
            .collect()
    })
}

/// ‖Y − c·X_k‖ of one module, X_k being X's k leading singular values, as many as Y has.
fn truncation_difference(x: &Update<'_>, y: &Update<'_>, factor: f64) -> Result<f64> {
    let count = numerical_rank(&values_of(y));
    let Some(whole) = decompose_update(x) else { return Ok(f64::NAN) };
    let count = count.min(whole.values.len());
    // Stored column after column: U as the rows of Uᵀ has to be turned, V already is Vᵀ.
    let left = whole.left.leading(count).transposed();
    let mut right = whole.right.leading(count);
    for (column, value) in whole.values[..count].iter().enumerate() {
        right.column_mut(column).iter_mut().for_each(|entry| *entry *= value);
    }
    let values = (Values::F64(&left.data), Values::F64(&right.data));
    let shorter = Update::new(x.rows(), x.columns(), count, values.0, values.1, factor)?;
    difference_norm(y, &shorter)
}

/// Two members, read module by module.
struct Both<'a> {
    collection: &'a Collection,
    readers: [Reader<'a>; 2],
    modules: BTreeMap<usize, Pair<'a>>,
}

impl<'a> Both<'a> {
    fn new(collection: &'a Collection, x: usize, y: usize) -> Result<Self> {
        let members = [x, y].map(|member| &collection.members[member]);
        let mut modules = BTreeMap::<usize, Pair<'a>>::new();
        for piece in &members[0].pieces {
            modules.entry(piece.module).or_default().0 = Some(piece);
        }
        for piece in &members[1].pieces {
            modules.entry(piece.module).or_default().1 = Some(piece);
        }
        let readers = [Reader::new(members[0])?, Reader::new(members[1])?];
        Ok(Self { collection, readers, modules })
    }

    fn for_each(&self, mut each: impl FnMut(&Update<'_>, &Update<'_>) -> Result<()>) -> Result<()> {
        for (&module, (x, y)) in &self.modules {
            let info = &self.collection.modules[module];
            let read = |reader: &Reader<'_>, piece: &Option<&Piece>| {
                piece.map(|piece| Ok((reader.factors::<f64>(piece)?, piece.rank))).transpose()
            };
            let (x, y) = (read(&self.readers[0], x)?, read(&self.readers[1], y)?);
            let zero = || Update::sum(info.rows, info.columns, Vec::new());
            let x = match &x {
                Some((factors, rank)) => factors.update(info.rows, info.columns, *rank)?,
                None => zero()?,
            };
            let y = match &y {
                Some((factors, rank)) => factors.update(info.rows, info.columns, *rank)?,
                None => zero()?,
            };
            each(&x, &y)?;
        }
        Ok(())
    }
}

/// ‖T − Σ wᵢ·Cᵢ‖ of stacked factors, which keeps its digits however small it is.
///
/// # Errors
/// As [`relation`].
pub fn combination_norm(
    collection: &Collection,
    target: usize,
    terms: &[(usize, f64)],
) -> Result<f64> {
    let all: Vec<(usize, f64)> =
        std::iter::once((target, 1.0)).chain(terms.iter().map(|(i, w)| (*i, -w))).collect();
    let readers: Vec<Reader<'_>> = all
        .iter()
        .map(|(member, _)| Reader::new(&collection.members[*member]))
        .collect::<Result<_>>()?;
    let mut square = 0.0;
    for (module, info) in collection.modules.iter().enumerate() {
        let mut parts = Vec::new();
        for ((member, weight), reader) in all.iter().zip(&readers) {
            if let Some(piece) = collection.members[*member].piece(module) {
                parts.push((reader.factors::<f64>(piece)?, piece.rank, *weight));
            }
        }
        let terms = parts.iter().map(|(factors, rank, weight)| Term {
            left: Values::F64(&factors.b),
            right: Values::F64(&factors.a),
            rank: *rank,
            scale: factors.scale * weight,
        });
        let sum = Update::sum(info.rows, info.columns, terms.collect())?;
        if sum.rank() > 0 {
            square += frobenius_norm(&sum).powi(2);
        }
    }
    Ok(square.sqrt())
}

/// What two adapters do beside low-rank updates and not alike. Values count as the same within
/// the rounding of the coarser of their types.
fn other_difference(x: &Member, y: &Member) -> Result<Option<String>> {
    let names = [&x.names, &y.names];
    let (x, y) = (x.open()?, y.open()?);
    let (ours, theirs) = (others(&x, names[0]), others(&y, names[1]));
    let mut difference = difference_of_others(&ours, &theirs)?;
    let starts = [&x, &y].map(|adapter| adapter.semantics().initialization);
    if starts[0] != starts[1] {
        difference.get_or_insert_with(|| {
            "their starts took different components out of the base's weights".to_owned()
        });
    }
    x.check_unchanged()?;
    y.check_unchanged()?;
    Ok(difference)
}

/// Tensors by the names that their adapters' family has for them.
type Others = BTreeMap<String, Tensor>;

fn difference_of_others(ours: &Others, theirs: &Others) -> Result<Option<String>> {
    let missing = |a: &Others, b: &Others| a.keys().find(|name| !b.contains_key(*name)).cloned();
    if let Some(name) = missing(ours, theirs).or_else(|| missing(theirs, ours)) {
        return Ok(Some(format!("only one of them has {name}")));
    }
    for (name, tensor) in ours {
        let other = &theirs[name];
        if tensor.elements() != other.elements() {
            return Ok(Some(format!("they have {name} of different shapes")));
        }
        if !tensor.dtype.is_mergeable() || !other.dtype.is_mergeable() {
            if !tensor.has_same_bytes(other)? {
                return Ok(Some(format!("they differ in {name}")));
            }
            continue;
        }
        let unit = |tensor: &Tensor| match tensor.dtype.name() {
            "BF16" => 2f64.powi(-8),
            "F16" => 2f64.powi(-11),
            _ => 2f64.powi(-24),
        };
        let (left, right) = (tensor.read_f64()?, other.read_f64()?);
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
        let difference = square(&mut left.iter().zip(&right).map(|(a, b)| a - b)).sqrt();
        let norm = square(&mut left.iter().copied()).sqrt();
        if difference > unit(tensor).max(unit(other)) * norm {
            return Ok(Some(format!("they differ in {name}")));
        }
    }
    Ok(None)
}

/// Everything that an adapter does beside low-rank updates.
fn others(adapter: &Adapter, names: &MemberNames) -> Others {
    let mut others = BTreeMap::new();
    for module in adapter.modules().values() {
        let name = names.of_module(&module.key);
        if let Some(magnitude) = module.magnitudes() {
            others.insert(format!("the magnitude of {name}"), magnitude.clone());
        }
        if !module.delta.has_product() {
            for (what, tensor) in module.tensors() {
                others.insert(format!("{what} of {name}"), tensor.clone());
            }
        }
        if let Some(bias) = &module.bias {
            others.insert(format!("the bias of {name}"), bias.clone());
        }
    }
    for saved in adapter.saved() {
        others.insert(names.of_parameter(&saved.path), saved.tensor.clone());
    }
    for rows in adapter.trained_rows() {
        // A module's name as a parameter's, without which nothing would be left of some.
        let name = names.of_parameter(&format!("{}.weight", rows.path));
        others.insert(format!("the trained rows {:?} of {name}", rows.rows), rows.tensor.clone());
    }
    others
}
