//! An adapter's modules as another format has them: under its names, cut or joined, with the factors
//! that it can hold.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use indexmap::IndexMap;

use super::naming::{Goal, Naming, goal};
use crate::adapter::computed::{self, Block};
use crate::adapter::deltas::LowRank;
use crate::adapter::{LayerKind, Module};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::names::canonical::Lie;
use crate::checkpoint::names::diffusion::DiffusionNames;
use crate::error::{Error, Result};
use crate::tensor::safetensors::Tensor;

/// A module as another format has it, and what it was made from.
#[derive(Debug)]
pub(super) struct Converted {
    pub module: Module,
    pub origins: Vec<Origin>,
}

/// A module, or rows of its product, and the rows of another's product that they became.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    /// The key of the source's module.
    pub key: String,
    /// The rows of its product; all, where there are none.
    pub rows: Option<Range<u64>>,
    /// The rows of the other's product; all, where there are none.
    pub own: Option<Range<u64>>,
    /// Whether the one product is the other's transpose.
    pub transposed: bool,
}

impl Origin {
    pub(super) fn whole(module: &Module) -> Self {
        Self { key: module.key.clone(), rows: None, own: None, transposed: false }
    }

    /// What of it became some of the rows of a module, counted from the first of these.
    fn within(&self, module: &Module, rows: &Range<u64>) -> Option<Self> {
        let own = self.own.clone().unwrap_or(0..module.outputs());
        let source = self.rows.as_ref().map_or(0, |rows| rows.start);
        let shared = own.start.max(rows.start)..own.end.min(rows.end);
        if shared.is_empty() {
            return None;
        }
        let from = |range: &Range<u64>, start: u64, other: u64| {
            range.start - start + other..range.end - start + other
        };
        Some(Self {
            rows: Some(from(&shared, own.start, source)),
            own: Some(from(&shared, rows.start, 0)),
            ..self.clone()
        })
    }
}

/// The modules as they are, under their own names.
pub(super) fn unchanged<'a>(modules: impl Iterator<Item = &'a Module>) -> Vec<Converted> {
    let same = |module: &Module| Converted {
        module: module.clone(),
        origins: vec![Origin::whole(module)],
    };
    modules.map(same).collect()
}

/// A module whose update is the product of two stored matrices, whatever it was made of.
///
/// # Errors
/// [`Error::Unsupported`] for an update that only the base makes, and for one that is no product of
/// narrow factors; [`Error::Io`], or that a file changed meanwhile.
pub(super) fn plain(module: &Module, path: &std::path::Path) -> Result<Module> {
    if module.delta.plain().is_some() {
        return Ok(module.clone());
    }
    let refused = |what: String| Err(Error::unsupported(path, what));
    let title = module.title();
    if module.delta.transform().is_some() || is_vector(module) {
        return refused(format!(
            "changes {title} by no product of two factors ({}), and a plain LoRA can say nothing else",
            module.delta.algorithm()
        ));
    }
    if module.delta.holds_experts() {
        return refused(format!("holds the factors of several experts for {title}"));
    }
    let [a, b] = computed::expanded(&module.delta, None)?;
    let (outputs, rank, inputs) = (b.shape[0], a.shape[0], a.shape[1]);
    let least = outputs.min(inputs);
    if rank >= least && module.rank < least || module.delta.algorithm() == "FULL" {
        return refused(format!(
            "adds to {title} what is of full rank ({least}), which no LoRA holds in less than the \
             weight itself"
        ));
    }
    let mut a_shape = vec![rank];
    a_shape.extend(module.delta.input_shape());
    let ones = a_shape.len() - 2;
    let b_shape: Vec<u64> =
        [outputs, rank].into_iter().chain(std::iter::repeat_n(1, ones)).collect();
    let (a, b) = (computed::reshaped(&a, a_shape), computed::reshaped(&b, b_shape));
    Ok(low_rank(module, a, b, module.scaling))
}

/// Whether a module is a norm or a bias.
pub(super) fn is_vector(module: &Module) -> bool {
    matches!(module.kind, LayerKind::Norm | LayerKind::Bias)
}

/// A module whose update is a product, whatever its factors.
///
/// # Errors
/// [`Error::Unsupported`] for what only the base makes, and for vectors.
pub(super) fn product(module: &Module, path: &std::path::Path) -> Result<Module> {
    match module.delta.has_product() && module.delta.transform().is_none() && !is_vector(module) {
        true => Ok(module.clone()),
        false => plain(module, path),
    }
}

/// A module with these factors instead of its own.
fn low_rank(module: &Module, a: Tensor, b: Tensor, scaling: f64) -> Module {
    let rank = a.shape[0];
    Module {
        delta: Arc::new(LowRank { a, b, diagonal: None }),
        rank,
        scaling,
        alpha: scaling * rank as f64,
        scale: None,
        ..module.clone()
    }
}

/// The parts of a fused module as they are found.
#[derive(Default)]
struct Gathered {
    heights: Vec<u64>,
    parts: Vec<(usize, Module)>,
}

/// The modules of a diffusion model under the names of a naming, which may differ from component to
/// component. The modules have the full names of the base.
///
/// # Errors
/// [`Error::Unsupported`] for what cannot be cut or joined, [`Error::Io`].
pub(super) fn renamed<'a>(
    modules: impl Iterator<Item = &'a Module>,
    names: &DiffusionNames,
    base: &Checkpoint,
    naming_of: &dyn Fn(&str) -> Naming,
    path: &std::path::Path,
) -> Result<Vec<Converted>> {
    let mut done = Vec::new();
    let mut gathered = IndexMap::<String, Gathered>::new();
    for module in modules {
        let goal = goal(names, base, &module.path, naming_of(&module.path), module.outputs())?;
        match goal {
            Goal::Whole { name, lie } => done.push(whole(module, name, lie, path)?),
            Goal::Parts(parts) => {
                let module = plain(module, path)?;
                for (name, rows) in parts {
                    done.push(cut(&module, name, rows)?);
                }
            }
            Goal::Part { name, slot, heights } => {
                let group = gathered.entry(name).or_default();
                group.heights = heights;
                group.parts.push((slot, plain(module, path)?));
            }
        }
    }
    for (name, group) in gathered {
        done.push(joined(name, group, path)?);
    }
    Ok(done)
}

/// A module under another name, with its rows in another order where that is so.
fn whole(module: &Module, name: String, lie: Lie, path: &std::path::Path) -> Result<Converted> {
    let mut origins = vec![Origin::whole(module)];
    let module = match lie {
        Lie::Same => Module { path: name, ..module.clone() },
        Lie::HalvesSwapped => {
            let own = plain(module, path)?;
            let (a, b) = own.delta.plain().expect("made plain");
            let half = own.outputs() / 2;
            let halves = [half..half * 2, 0..half];
            let swapped = |tensor: &Tensor| {
                let parts: Vec<_> =
                    halves.iter().map(|rows| computed::rows(tensor, rows)).collect();
                computed::stacked(&parts)
            };
            origins = halves
                .iter()
                .zip([0..half, half..half * 2])
                .map(|(rows, to)| Origin {
                    rows: Some(rows.clone()),
                    own: Some(to),
                    ..Origin::whole(module)
                })
                .collect();
            Module {
                path: name,
                magnitude: own.magnitude.as_ref().map(swapped).transpose()?,
                bias: own.bias.as_ref().map(swapped).transpose()?,
                ..low_rank(&own, a.clone(), swapped(b)?, own.scaling)
            }
        }
        Lie::Transposed => {
            let own = plain(module, path)?;
            if own.magnitude.is_some() || own.bias.is_some() {
                return Err(Error::unsupported(
                    path,
                    format!(
                        "has magnitudes or a bias for {}, which is stored transposed there",
                        own.path
                    ),
                ));
            }
            let (a, b) = own.delta.plain().expect("made plain");
            origins[0].transposed = true;
            let turned =
                low_rank(&own, computed::transposed(b)?, computed::transposed(a)?, own.scaling);
            Module { path: name, ..turned }
        }
    };
    Ok(Converted { module, origins })
}

/// Some rows of a module's product as a module of its own.
fn cut(module: &Module, name: String, rows: Range<u64>) -> Result<Converted> {
    let (a, b) = module.delta.plain().expect("made plain");
    let of = |tensor: &Tensor| computed::rows(tensor, &rows);
    let part = Module {
        path: name,
        magnitude: module.magnitude.as_ref().map(of),
        bias: module.bias.as_ref().map(of),
        ..low_rank(module, a.clone(), of(b), module.scaling)
    };
    let origin = Origin { rows: Some(rows), ..Origin::whole(module) };
    Ok(Converted { module: part, origins: vec![origin] })
}

/// The modules as a reader has them: one that is read as parts, each under its number behind the name
/// of the whole, as those.
pub(super) fn as_read(converted: &[Converted], found: &HashMap<String, Module>) -> Vec<Converted> {
    let mut read = Vec::with_capacity(converted.len());
    for Converted { module, origins } in converted {
        let part = |number: u64| found.get(&format!("{}.{number}", module.path));
        if found.contains_key(&*module.title()) || part(0).is_none() {
            read.push(Converted { module: module.clone(), origins: origins.clone() });
            continue;
        }
        let mut start = 0;
        for (number, part) in (0..).map_while(|number| Some((number, part(number)?))) {
            let rows = start..start + part.outputs();
            start = rows.end;
            let path = format!("{}.{number}", module.path);
            read.push(Converted {
                module: Module { path, ..module.clone() },
                origins: origins.iter().filter_map(|origin| origin.within(module, &rows)).collect(),
            });
        }
    }
    read
}

/// Several modules as the one that they are parts of.
fn joined(name: String, group: Gathered, path: &std::path::Path) -> Result<Converted> {
    let Gathered { heights, mut parts } = group;
    parts.sort_by_key(|(slot, _)| *slot);
    let (_, first) = &parts[0];
    let has = |of: fn(&Module) -> &Option<Tensor>| {
        parts.iter().filter(|(_, module)| of(module).is_some()).count()
    };
    let all = heights.len();
    for (count, what) in
        [(has(|module| &module.magnitude), "magnitudes"), (has(|module| &module.bias), "a bias")]
    {
        if count != 0 && count != all {
            return Err(Error::unsupported(
                path,
                format!("has {what} for some parts of {name} alone, which is one module there"),
            ));
        }
    }
    let factors: Vec<_> =
        parts.iter().map(|(_, module)| module.delta.plain().expect("made plain")).collect();
    let mut origins = Vec::new();
    for (slot, module) in &parts {
        let start = heights[..*slot].iter().sum::<u64>();
        let own = Some(start..start + heights[*slot]);
        origins.push(Origin { own, ..Origin::whole(module) });
    }
    let mut shares = factors.len() == all;
    for (a, _) in &factors[1..] {
        let alike = a.dtype == factors[0].0.dtype && a.shape == factors[0].0.shape;
        shares = shares && alike && a.has_same_bytes(factors[0].0)?;
    }
    let same_scale = parts.iter().all(|(_, module)| module.scaling == first.scaling);
    let scaling = first.scaling;
    let (a, b) = if shares && same_scale {
        let rows: Vec<Tensor> = factors.iter().map(|(_, b)| (*b).clone()).collect();
        (factors[0].0.clone(), computed::stacked(&rows)?)
    } else {
        let rows: Vec<Tensor> = factors.iter().map(|(a, _)| (*a).clone()).collect();
        let block = |slot: usize| {
            let found = parts.iter().zip(&factors).find(|((other, _), _)| *other == slot);
            let factor = found.map(|((_, module), (_, b))| (module.scaling / scaling, *b));
            Block { rows: heights[slot], factor }
        };
        let blocks: Vec<_> = (0..all).map(block).collect();
        (computed::stacked(&rows)?, computed::block_diagonal(&blocks)?)
    };
    let stacked = |of: fn(&Module) -> &Option<Tensor>| -> Result<Option<Tensor>> {
        let found: Vec<Tensor> =
            parts.iter().filter_map(|(_, module)| of(module).clone()).collect();
        if found.is_empty() { Ok(None) } else { computed::stacked(&found).map(Some) }
    };
    let module = Module {
        path: name.clone(),
        key: name,
        magnitude: stacked(|module| &module.magnitude)?,
        bias: stacked(|module| &module.bias)?,
        ..low_rank(first, a, b, scaling)
    };
    Ok(Converted { module, origins })
}
