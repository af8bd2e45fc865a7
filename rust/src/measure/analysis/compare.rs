//! What several adapters have in common, module by module.

use std::collections::HashMap;

use indexmap::IndexMap;
use rayon::prelude::*;
use serde::Serialize;

use crate::adapter::Adapter;
use crate::adapter::alignment::{Alignment, Identity, Layout, Unit};
use crate::error::Result;
use crate::measure::overlap::{
    SIGN_SAMPLES, SingularBases, SubspaceSimilarity, cosine_of, difference_norm, inner_product,
    sign_agreement,
};
use crate::measure::products::{PartFactors, Product, products_of};
use crate::measure::spectrum::{Update, frobenius_norm};
use crate::parallel::task::Task;

/// Two adapters' updates of one module. Output is the left side, input the right.
#[derive(Debug, Clone, Serialize)]
pub struct PairComparison {
    /// Position of the first adapter.
    pub first: usize,
    /// Position of the second, greater than the first's.
    pub second: usize,
    /// ⟨X, Y⟩.
    pub inner_product: f64,
    /// ⟨X, Y⟩/(‖X‖·‖Y‖); NaN where one is zero or not finite.
    pub cosine: f64,
    /// ‖X − Y‖_F / max(‖X‖_F, ‖Y‖_F).
    pub relative_difference: f64,
    /// The share of entries that both change in the same direction.
    pub sign_agreement: f64,
    /// Whether they were sampled.
    pub sign_sampled: bool,
    /// The numbers i and j of leading directions that φ(i, j) is given for.
    pub sizes: [Vec<usize>; 2],
    /// φ(i, j) of the output subspaces and its expectation for random ones.
    pub output_phi: Vec<Vec<f64>>,
    /// That expectation.
    pub output_expected: Vec<Vec<f64>>,
    /// φ(i, j) of the input subspaces.
    pub input_phi: Vec<Vec<f64>>,
    /// Its expectation for random ones.
    pub input_expected: Vec<Vec<f64>>,
    /// Principal angles between the whole output subspaces, ascending, in radians.
    pub output_angles: Vec<f64>,
    /// Principal angles between the whole input subspaces.
    pub input_angles: Vec<f64>,
}

/// One module in each of the adapters.
#[derive(Debug, Clone, Serialize)]
pub struct ModuleComparison {
    /// Its path in the first adapter that has it.
    pub path: String,
    /// (out, in) of ΔW in the first adapter that has it.
    pub shape: [usize; 2],
    /// ‖ΔW‖_F in each adapter; `None` where it is absent.
    pub norms: Vec<Option<f64>>,
    /// r in each adapter.
    pub ranks: Vec<Option<u64>>,
    /// The pairs of adapters that both have it in one shape, in order; none where modules are not
    /// compared one by one.
    pub pairs: Vec<PairComparison>,
}

/// What several adapters have in common.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// Cosines of the whole updates, a row for each adapter. What only one has is zero in the
    /// other. NaN where a module has different shapes, an adapter is zero or not finite, or nothing
    /// tells which modules of two adapters are the same.
    pub cosine: Vec<Vec<f64>>,
    /// Every module of any adapter, in the order in which they are first met.
    pub modules: Vec<ModuleComparison>,
    /// What could not be compared, and why.
    pub notes: Vec<String>,
}

/// Compares any number of adapters, on the given threads. Progress is counted in bytes.
///
/// With `modules` the pairs of each module are told of, which for N adapters are N²/2 times the
/// modules; the cosines of the whole updates need their inner products alone.
///
/// # Errors
/// [`crate::Error::Adapter`] if a file changed meanwhile, [`crate::Error::Io`],
/// [`crate::Error::Cancelled`].
pub fn compare(
    adapters: &[&Adapter],
    modules: bool,
    pool: &rayon::ThreadPool,
    task: &Task,
) -> Result<Comparison> {
    let tells_pairs = modules;
    let layouts: Vec<_> = adapters.iter().map(|adapter| Layout::of(adapter)).collect();
    let alignment = Alignment::of(&layouts.iter().collect::<Vec<_>>(), task)?;
    let products: Vec<_> = adapters.iter().map(|adapter| products_of(adapter)).collect();
    let mut units = IndexMap::<(usize, &Identity), Vec<Option<Part<'_>>>>::new();
    for (position, names) in alignment.members.iter().enumerate() {
        for unit in &names.units {
            let members = units.entry((names.family, &unit.identity));
            let members = members.or_insert_with(|| vec![None; adapters.len()]);
            members[position] = Some(Part { product: products[position][unit.part], unit });
        }
    }
    task.expect(units.values().map(|members| bytes_of(members)).sum());
    let mut labels = HashMap::<String, usize>::new();
    let units: Vec<_> = units
        .into_iter()
        .map(|((family, identity), members)| {
            let label = alignment.label(family, identity);
            let count = labels.entry(label.clone()).or_default();
            *count += 1;
            // One name in adapters that are not comparable.
            (if *count > 1 { format!("{label} ({count})") } else { label }, members)
        })
        .collect();
    let compared: Vec<Compared> = pool.install(|| {
        units
            .par_iter()
            .map(|(path, members)| {
                let compared = compare_module(path, adapters, members, tells_pairs, task)?;
                task.advance(bytes_of(members));
                Ok(compared)
            })
            .collect::<Result<_>>()
    })?;
    adapters.iter().try_for_each(|adapter| adapter.check_unchanged())?;
    let count = adapters.len();
    let mut products = vec![vec![0.0; count]; count];
    let mut modules = Vec::with_capacity(compared.len());
    let mut notes = notes_of(adapters, &alignment);
    for (x, row) in products.iter_mut().enumerate() {
        for (y, product) in row.iter_mut().enumerate() {
            if alignment.reason(x, y).is_some() {
                *product = f64::NAN;
            }
        }
    }
    for Compared { mut module, notes: own, clashes } in compared {
        for (position, norm) in module.norms.iter().enumerate() {
            products[position][position] += norm.map_or(0.0, |norm| norm * norm);
        }
        for pair in &module.pairs {
            products[pair.first][pair.second] += pair.inner_product;
        }
        if !tells_pairs {
            module.pairs = Vec::new();
        }
        for (first, second) in clashes {
            products[first][second] = f64::NAN;
        }
        notes.extend(own);
        modules.push(module);
    }
    let norms: Vec<f64> = (0..count).map(|index| products[index][index].sqrt()).collect();
    let cosine = (0..count).map(|row| {
        (0..count)
            .map(|column| match row == column {
                true => itself(norms[row]),
                false => {
                    let product = products[row.min(column)][row.max(column)];
                    cosine_of(product, [norms[row], norms[column]])
                }
            })
            .collect()
    });
    Ok(Comparison { cosine: cosine.collect(), modules, notes })
}

/// The cosine of an update with itself.
fn itself(norm: f64) -> f64 {
    if norm.is_finite() && norm > 0.0 { 1.0 } else { f64::NAN }
}

/// Which adapters are not comparable, and why: a note for each two families of them.
fn notes_of(adapters: &[&Adapter], alignment: &Alignment) -> Vec<String> {
    let mut pairs = IndexMap::<(usize, usize), Vec<(usize, usize)>>::new();
    let family = |member: usize| alignment.members[member].family;
    for x in 0..adapters.len() {
        for y in (x + 1..adapters.len()).filter(|y| family(*y) != family(x)) {
            let key = (family(x).min(family(y)), family(x).max(family(y)));
            pairs.entry(key).or_default().push((x, y));
        }
    }
    let note = |pairs: &Vec<(usize, usize)>| {
        let (x, y) = pairs[0];
        let more = match pairs.len() - 1 {
            0 => String::new(),
            1 => " (nor is another pair)".to_owned(),
            more => format!(" (nor are {more} other pairs)"),
        };
        format!(
            "the adapters {} and {} are not comparable{more}: {}",
            adapters[x].path().display(),
            adapters[y].path().display(),
            alignment.reason(x, y).unwrap_or_default()
        )
    };
    pairs.values().map(note).collect()
}

/// An adapter's product that is, or holds, one of the modules that are compared.
#[derive(Debug, Clone, Copy)]
struct Part<'a> {
    product: Product<'a>,
    unit: &'a Unit,
}

impl Part<'_> {
    /// What it is of the whole product, where it is less or lies otherwise.
    fn is_whole(&self) -> bool {
        !self.unit.is_transposed && self.unit.outputs.is_none()
    }
}

fn bytes_of(members: &[Option<Part<'_>>]) -> u64 {
    members.iter().flatten().map(|part| part.product.bytes()).sum()
}

struct Compared {
    module: ModuleComparison,
    notes: Vec<String>,
    clashes: Vec<(usize, usize)>,
}

/// An adapter's part in the comparison of one module.
struct Member<'a> {
    position: usize,
    update: Update<'a>,
    norm: f64,
    bases: Option<SingularBases>,
}

fn compare_module(
    path: &str,
    adapters: &[&Adapter],
    parts: &[Option<Part<'_>>],
    tells_pairs: bool,
    task: &Task,
) -> Result<Compared> {
    let mut notes = Vec::new();
    let mut factors = Vec::new();
    let mut cut: Vec<Option<PartFactors>> = Vec::new();
    let mut rooms = vec![Vec::new(); adapters.len()];
    for (position, (part, room)) in parts.iter().zip(&mut rooms).enumerate() {
        let Some(part) = part else { continue };
        task.check()?;
        let read = part.product.read(room)?;
        let Unit { is_transposed, outputs, .. } = part.unit;
        let own = (!part.is_whole()).then(|| read.part(*is_transposed, outputs.as_ref()));
        cut.push(own.transpose()?);
        factors.push((position, read));
    }
    let mut members = Vec::new();
    let mut norms = vec![None; adapters.len()];
    for ((position, factors), cut) in factors.iter().zip(&cut) {
        task.check()?;
        let update = cut.as_ref().map_or_else(|| factors.update(), PartFactors::update)?;
        let (position, norm) = (*position, frobenius_norm(&update));
        // What rounding leaves of a product that is zero has no direction.
        let update = if norm == 0.0 { update.scaled(0.0) } else { update };
        norms[position] = Some(norm);
        members.push(Member { position, update, norm, bases: None });
    }
    let shape = members.first().map_or([0, 0], |m| [m.update.rows(), m.update.columns()]);
    if tells_pairs && members.len() > 1 {
        for member in &mut members {
            task.check()?;
            member.bases = SingularBases::of(&member.update);
        }
    }
    let mut pairs = Vec::new();
    let mut clashes = Vec::new();
    for (index, x) in members.iter().enumerate() {
        for y in &members[index + 1..] {
            task.check()?;
            if (x.update.rows(), x.update.columns()) == (y.update.rows(), y.update.columns()) {
                pairs.push(compare_pair(x, y, tells_pairs)?);
            } else {
                clashes.push((x.position, y.position));
                if !tells_pairs && clashes.len() > 1 {
                    continue;
                }
                notes.push(format!(
                    "module {path} updates a weight of shape [{}, {}] in {} but of shape [{}, {}] \
                     in {}; they were not made for one model",
                    x.update.rows(),
                    x.update.columns(),
                    adapters[x.position].path().display(),
                    y.update.rows(),
                    y.update.columns(),
                    adapters[y.position].path().display(),
                ));
            }
        }
    }
    let rank = |part: &Option<Part<'_>>| part.map(|part| part.product.extents().2 as u64);
    let ranks = parts.iter().map(rank).collect();
    let module = ModuleComparison { path: path.to_owned(), shape, norms, ranks, pairs };
    Ok(Compared { module, notes, clashes })
}

/// What two updates have in common; of what is not told of, the inner product alone.
fn compare_pair(x: &Member<'_>, y: &Member<'_>, is_told: bool) -> Result<PairComparison> {
    let product = inner_product(&x.update, &y.update)?;
    let mut pair = PairComparison {
        first: x.position,
        second: y.position,
        inner_product: product,
        cosine: cosine_of(product, [x.norm, y.norm]),
        relative_difference: f64::NAN,
        sign_agreement: f64::NAN,
        sign_sampled: false,
        sizes: [Vec::new(), Vec::new()],
        output_phi: Vec::new(),
        output_expected: Vec::new(),
        input_phi: Vec::new(),
        input_expected: Vec::new(),
        output_angles: Vec::new(),
        input_angles: Vec::new(),
    };
    if !is_told {
        return Ok(pair);
    }
    pair.relative_difference = difference_norm(&x.update, &y.update)? / x.norm.max(y.norm);
    // One seed for all: what is drawn depends on nothing but the shape.
    let signs = sign_agreement(&x.update, &y.update, SIGN_SAMPLES, 0)?;
    (pair.sign_agreement, pair.sign_sampled) = (signs.share, signs.sampled);
    if let (Some(left), Some(right)) = (&x.bases, &y.bases) {
        pair.sizes = [sizes(left.rank()), sizes(right.rank())];
        let output = left.left_similarity(right)?;
        let input = left.right_similarity(right)?;
        (pair.output_phi, pair.output_expected) = grid(&output, &pair.sizes);
        (pair.input_phi, pair.input_expected) = grid(&input, &pair.sizes);
        if left.rank() > 0 && right.rank() > 0 {
            let (i, j) = (left.rank(), right.rank());
            pair.output_angles = left.left_angles(right, i, j)?.angles;
            pair.input_angles = left.right_angles(right, i, j)?.angles;
        }
    }
    Ok(pair)
}

/// The powers of two up to a rank, and the rank.
fn sizes(rank: usize) -> Vec<usize> {
    let powers = (0..).map(|power| 1 << power).take_while(|&size| size < rank);
    powers.chain((rank > 0).then_some(rank)).collect()
}

fn grid(
    similarity: &SubspaceSimilarity,
    sizes: &[Vec<usize>; 2],
) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let table = |of: &dyn Fn(usize, usize) -> f64| {
        sizes[0].iter().map(|&i| sizes[1].iter().map(|&j| of(i, j)).collect()).collect()
    };
    let phi = |i, j| similarity.phi(i, j).unwrap_or(f64::NAN);
    (table(&phi), table(&|i, j| similarity.expected(i, j)))
}
