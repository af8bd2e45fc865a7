//! The factors of all experts of a layer under a target's names: one matrix of each expert, or gate and
//! upward matrix as one.

use std::path::Path;
use std::sync::Arc;

use indexmap::IndexMap;

use super::modules::{Converted, Origin};
use super::targets::Target;
use crate::adapter::computed;
use crate::adapter::deltas::{Interleaved, SharedReads};
use crate::adapter::expert_factors::{self, Stack, StackLayout};
use crate::adapter::factors::common;
use crate::adapter::{Adapter, Delta, Expert, Module, TransposedExperts};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::kernel::convert::widen_f64;
use crate::tensor::dtype::Dtype;

/// What a target calls the matrices of experts.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExpertMatrices {
    /// Gate, upward, and back.
    apart: [&'static str; 3],
    /// Gate and upward matrix as one, where it has them so.
    fused: Option<&'static str>,
    /// Whether the keys of one layer are PEFT's wrappers around one another.
    is_wrapped: bool,
}

impl Target {
    /// What it calls the matrices of experts, where it has a place for the factors of all.
    pub fn expert_matrices(&self) -> Option<ExpertMatrices> {
        let apart = ["gate_proj", "up_proj", "down_proj"];
        Some(match self.name {
            "peft" => ExpertMatrices { apart, fused: Some(GATE_UP), is_wrapped: true },
            "mlx" => ExpertMatrices { apart, fused: None, is_wrapped: false },
            "tinker" => {
                ExpertMatrices { apart: ["w1", "w3", "w2"], fused: None, is_wrapped: false }
            }
            _ => return None,
        })
    }
}

/// What models call gate and upward matrix as one.
const GATE_UP: &str = "gate_up_proj";
/// PEFT's wrapper around a module that has another one around it.
const INNER: &str = ".base_layer";

/// A matrix of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Matrix {
    Gate,
    Up,
    Down,
    GateUp,
}

impl Matrix {
    fn of(name: &str) -> Option<Self> {
        if name == GATE_UP {
            return Some(Self::GateUp);
        }
        match (expert_factors::slot_of_matrix(name), expert_factors::names_of_matrix(name).len()) {
            (Some(0), _) => Some(Self::Gate),
            (Some(_), _) => Some(Self::Up),
            (None, 0) => None,
            (None, _) => Some(Self::Down),
        }
    }
}

/// The adapter with each module of experts as that of the one parameter that its factors belong to, where
/// PEFT's order of wrappers tells; none where there is nothing to tell.
pub(super) fn resolved(adapter: &Adapter) -> Option<Adapter> {
    let is_open = |module: &Module| module.delta.holds_experts() && module.parameters.len() > 1;
    if !adapter.modules().values().any(is_open) {
        return None;
    }
    let own = |module: &Module| {
        let wrappers = adapter.modules().values().filter(|other| other.path == module.path);
        if !is_open(module) || wrappers.count() != module.parameters.len() {
            return module.clone();
        }
        let order = |name: &str| match Matrix::of(name) {
            Some(Matrix::GateUp | Matrix::Gate) => 0,
            Some(Matrix::Up) => 1,
            _ => 2,
        };
        let mut parameters = module.parameters.clone();
        parameters.sort_by_key(|parameter| order(&parameter.name));
        // The first one is innermost.
        let depth = module.key.matches(INNER).count();
        let Some(place) = parameters.len().checked_sub(depth + 1) else { return module.clone() };
        let only = parameters.swap_remove(place);
        let (rank, scaling) = (only.rank, only.scaling);
        let alpha = scaling * rank as f64;
        Module { parameters: vec![only], rank, scaling, alpha, ..module.clone() }
    };
    let modules = adapter.modules().iter().map(|(key, module)| (key.clone(), own(module)));
    let (saved, rows) = (adapter.saved().to_vec(), adapter.trained_rows().to_vec());
    Some(adapter.renamed(modules.collect(), saved, rows, adapter.grammar()))
}

/// Whether a module has the factors of experts for which the target has a place.
pub(super) fn is_of_experts(module: &Module, target: &Target) -> bool {
    module.delta.holds_experts() && target.expert_matrices().is_some()
}

/// The modules of experts as the target has them.
///
/// # Errors
/// [`Error::Unsupported`] where nothing tells which parameter or which rows are meant, [`Error::Io`].
pub(super) fn converted(
    modules: &[&Module],
    adapter: &Adapter,
    base: Option<&Checkpoint>,
    target: &Target,
) -> Result<Vec<Converted>> {
    let path = adapter.path();
    let Some(names) = target.expert_matrices() else { return Ok(Vec::new()) };
    let mut layers = IndexMap::<&str, Vec<(Matrix, &Module)>>::new();
    for module in modules {
        let (parameter, matrix) = matrix_of(module, adapter)?;
        let layer = layers.entry(&module.path).or_default();
        if layer.iter().any(|(other, _)| *other == matrix) {
            return Err(Error::unsupported(
                path,
                format!("has factors of {}.{parameter} twice, under two names", module.path),
            ));
        }
        layer.push((matrix, *module));
    }
    let in_turn = expert_factors::has_rows_in_turn(base);
    let mut done = Vec::new();
    for (layer, members) in layers {
        let needs_base = |what: &str| {
            Error::unsupported(
                path,
                format!(
                    "has factors of all experts of {layer} for {what}, and the rows of both in one \
                     weight are told by the base; give it (base=, --base)"
                ),
            )
        };
        let get = |matrix| members.iter().find(|(own, _)| *own == matrix).map(|(_, one)| *one);
        let (gate, up, fused) = (get(Matrix::Gate), get(Matrix::Up), get(Matrix::GateUp));
        let mut own = Vec::new();
        match (fused, names.fused) {
            (Some(fused), Some(name)) => own.push(renamed(fused, name)),
            (Some(fused), None) if fused.delta.rows_in_turn().is_some() => {
                own.push(renamed(fused, GATE_UP));
            }
            (Some(fused), None) => match in_turn {
                None => return Err(needs_base("gate and upward matrix as one")),
                Some(true) => own.push(taken_in_turn(fused)?),
                Some(false) => own.extend(halves(fused, names.apart)?),
            },
            (None, _) => {}
        }
        match (gate, up, names.fused) {
            (None, None, _) => {}
            (_, _, Some(name)) if fused.is_none() => {
                if in_turn.is_none() {
                    return Err(needs_base("gate and upward matrix apart"));
                }
                own.push(joined(gate, up, name, path)?);
            }
            _ => {
                own.extend(gate.map(|gate| renamed(gate, names.apart[0])));
                own.extend(up.map(|up| renamed(up, names.apart[1])));
            }
        }
        own.extend(get(Matrix::Down).map(|down| renamed(down, names.apart[2])));
        if names.is_wrapped {
            // PEFT wraps a module once for each of its parameters, the first one innermost.
            let count = own.len();
            for (place, one) in own.iter_mut().enumerate() {
                one.module.key = format!("{layer}{}", INNER.repeat(count - 1 - place));
            }
        }
        done.extend(own);
    }
    Ok(done)
}

/// The parameter that a module's factors belong to, where their product is that of layers, (out, in).
fn matrix_of<'a>(module: &'a Module, adapter: &Adapter) -> Result<(&'a str, Matrix)> {
    let refused = |what: String| Error::unsupported(adapter.path(), what);
    let told = adapter.semantics().transposed_experts;
    if !module.delta.is_of_layers() && told != Some(TransposedExperts::IfStoredTransposed) {
        return Err(refused(format!(
            "has factors of all experts of {} as a release of PEFT before 0.19.1 lays them, whose \
             orientation other programs do not have",
            module.path
        )));
    }
    let parameter = module.only_parameter();
    let found = parameter.and_then(|one| Some((one.name.as_str(), Matrix::of(&one.name)?)));
    found.ok_or_else(|| {
        refused(format!(
            "has factors of all experts under {}, and nothing tells of which matrix (gate_proj, \
             up_proj, down_proj or gate_up_proj)",
            module.key
        ))
    })
}

/// A module of that parameter.
fn module_of(like: &Module, name: &str, delta: Arc<dyn Delta>, rank: u64, scaling: f64) -> Module {
    let key = format!("{}.{name}", like.path);
    expert_factors::module(key.clone(), &key, delta, rank, scaling)
}

fn renamed(module: &Module, name: &str) -> Converted {
    let own = module_of(module, name, module.delta.clone(), module.rank, module.scaling);
    Converted { module: own, origins: vec![Origin::whole(module)] }
}

/// The factors of all experts in numbers: A (experts, rank, in) and B (experts, out, rank).
struct Factors {
    count: u64,
    rank: u64,
    outputs: u64,
    inputs: u64,
    dtype: Dtype,
    a: Vec<f64>,
    b: Vec<f64>,
}

impl Factors {
    fn of(module: &Module) -> Result<Self> {
        let count = module.products().count() as u64;
        let (outputs, inputs) = (module.outputs(), module.inputs());
        let mut found = Self {
            count,
            rank: module.rank,
            outputs,
            inputs,
            dtype: Dtype::F32,
            a: Vec::new(),
            b: Vec::new(),
        };
        for index in 0..count {
            let pair = module.pair(Some(Expert { index, count }), None, None)?;
            let own = common(&pair.a_dtype, &pair.b_dtype);
            found.dtype = if index == 0 { own } else { common(&found.dtype, &own) };
            found.a.extend(widen_f64(&pair.a_dtype, &pair.a));
            found.b.extend(widen_f64(&pair.b_dtype, &pair.b));
        }
        Ok(found)
    }

    /// The same with these rows of each expert's B.
    fn rows(&self, rows: impl Iterator<Item = u64> + Clone) -> Self {
        let width = self.rank as usize;
        let mut b = Vec::new();
        for expert in self.b.chunks_exact(self.outputs as usize * width) {
            for row in rows.clone() {
                b.extend_from_slice(&expert[row as usize * width..(row as usize + 1) * width]);
            }
        }
        let outputs = rows.count() as u64;
        Self { outputs, a: self.a.clone(), b, dtype: self.dtype.clone(), ..*self }
    }

    fn delta(&self, like: &Module) -> Result<Arc<dyn Delta>> {
        let Self { count, rank, outputs, inputs, .. } = *self;
        let (_, named) = like.delta.tensors()[0];
        let a = computed::in_memory(named, &self.dtype, vec![count, rank, inputs], &self.a)?;
        let b = computed::in_memory(named, &self.dtype, vec![count, outputs, rank], &self.b)?;
        let stack = Stack { layout: StackLayout::Stacked, count, rank };
        let made = stack.delta(a, b, &Arc::new(SharedReads::default()));
        made.map_err(|problem| Error::adapter(named.file().path(), problem))
    }
}

/// Gate and upward matrix, which lie above one another, apart.
fn halves(module: &Module, names: [&str; 3]) -> Result<[Converted; 2]> {
    let factors = Factors::of(module)?;
    let half = module.outputs() / 2;
    let part = |name: &str, rows: std::ops::Range<u64>| -> Result<Converted> {
        let delta = factors.rows(rows.clone()).delta(module)?;
        let own = module_of(module, name, delta, module.rank, module.scaling);
        let origin = Origin { rows: Some(rows), ..Origin::whole(module) };
        Ok(Converted { module: own, origins: vec![origin] })
    };
    Ok([part(names[0], 0..half)?, part(names[1], half..half * 2)?])
}

/// The same of rows in turn, as the one module that is read of both.
fn taken_in_turn(module: &Module) -> Result<Converted> {
    let factors = Factors::of(module)?;
    let part = |first: usize| {
        let rows = (first as u64..module.outputs()).step_by(2);
        factors.rows(rows).delta(module).map(Some)
    };
    let delta = Arc::new(Interleaved { gate: part(0)?, up: part(1)? });
    let own = module_of(module, GATE_UP, delta, module.rank * 2, module.scaling);
    Ok(Converted { module: own, origins: vec![Origin::whole(module)] })
}

/// Gate and upward matrix above one another, each beside zeros.
fn joined(
    gate: Option<&Module>,
    up: Option<&Module>,
    name: &str,
    path: &Path,
) -> Result<Converted> {
    let parts = [gate, up];
    let Some(first) = parts.iter().flatten().next().copied() else {
        return Err(Error::unsupported(path, "has no factors of experts"));
    };
    let shape = |one: &Module| (one.outputs(), one.inputs(), one.products().count());
    if parts.iter().flatten().any(|one| shape(one) != shape(first)) {
        return Err(Error::unsupported(
            path,
            format!("has factors of gate and upward matrices of {} in two shapes", first.path),
        ));
    }
    let half = first.outputs();
    let scaling = first.scaling;
    let read = |one: Option<&Module>| one.map(Factors::of).transpose();
    let factors = [read(gate)?, read(up)?];
    let present = || factors.iter().flatten();
    let rank: u64 = present().map(|one| one.rank).sum();
    let (count, inputs) = (first.products().count() as u64, first.inputs());
    let dtype = present().map(|one| one.dtype.clone()).reduce(|all, one| common(&all, &one));
    let mut whole = Factors {
        count,
        rank,
        outputs: half * 2,
        inputs,
        dtype: dtype.unwrap_or(Dtype::F32),
        a: Vec::new(),
        b: vec![0.0; (count * half * 2 * rank) as usize],
    };
    for expert in 0..count as usize {
        let mut column = 0;
        for (slot, (own, module)) in factors.iter().zip(parts).enumerate() {
            let (Some(own), Some(module)) = (own, module) else { continue };
            let (width, height) = (own.rank as usize, half as usize);
            let size = width * inputs as usize;
            whole.a.extend_from_slice(&own.a[expert * size..(expert + 1) * size]);
            let factor = module.scaling / scaling;
            for row in 0..height {
                let from = &own.b[(expert * height + row) * width..][..width];
                let start = ((expert * 2 + slot) * height + row) * rank as usize + column;
                let to = &mut whole.b[start..start + width];
                to.iter_mut().zip(from).for_each(|(to, from)| *to = from * factor);
            }
            column += width;
        }
    }
    let mut origins = Vec::new();
    for (slot, module) in parts.into_iter().enumerate() {
        let start = slot as u64 * half;
        let own = Some(start..start + half);
        origins.extend(module.map(|module| Origin { own, ..Origin::whole(module) }));
    }
    let own = module_of(first, name, whole.delta(first)?, rank, scaling);
    Ok(Converted { module: own, origins })
}
