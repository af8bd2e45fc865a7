//! The order in which llama.cpp stores the rows and columns of attention, and how it is undone.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::adapter::deltas::Order;

/// How an architecture's converter orders what it stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// As transformers has it.
    AsStored,
    /// The two halves of each head of queries and keys, interleaved: rows viewed as (heads, 2, d/2)
    /// become (heads, d/2, 2).
    Rotary,
    /// Fused queries, keys and values, which transformers has group by group: all queries, all keys,
    /// all values.
    FusedByHead,
    /// Heads of values of linear attention, viewed as (k, v/k, d), become (v/k, k, d).
    LinearAttention,
}

/// What a config tells of a model's heads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Heads {
    /// The heads of queries.
    pub queries: Option<u64>,
    /// The heads of keys and of values.
    pub keys: Option<u64>,
    /// The heads of keys, those of values, and a head's width of keys, of linear attention.
    pub linear: Option<(u64, u64, u64)>,
}

impl Heads {
    /// Of a model's config, or of the part of it that describes the language model.
    pub fn of_config(config: &Map<String, Value>) -> Self {
        let number = |names: &[&str]| {
            names.iter().find_map(|name| config.get(*name).and_then(Value::as_u64))
        };
        let flag = |name: &str| config.get(name).and_then(Value::as_bool);
        let queries = number(&["num_attention_heads", "n_head", "num_heads"]);
        let keys = match (flag("new_decoder_architecture"), flag("multi_query")) {
            // Falcon's, whose fields say other things of its older models.
            (Some(true), _) => number(&["num_kv_heads", "n_head_kv"]).or(queries),
            (_, Some(true)) => number(&["n_head_kv"]).or(Some(1)),
            (_, Some(false)) => queries,
            _ => number(&["num_key_value_heads", "num_kv_heads", "n_head_kv"]).or(queries),
        };
        let linear = number(&["linear_num_key_heads"]).zip(number(&["linear_num_value_heads"]));
        let width = number(&["linear_key_head_dim"]);
        let linear = linear.zip(width).map(|((keys, values), width)| (keys, values, width));
        Self { queries, keys, linear }
    }

    /// These, and what they lack from others.
    #[must_use]
    pub fn or(self, others: Self) -> Self {
        let Self { queries, keys, linear } = others;
        Self {
            queries: self.queries.or(queries),
            keys: self.keys.or(keys),
            linear: self.linear.or(linear),
        }
    }
}

/// The orders of one tensor.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Orders {
    /// Of its rows.
    pub outputs: Option<Order>,
    /// Of its columns.
    pub inputs: Option<Order>,
}

/// Why there is no order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unordered {
    /// The heads are not known.
    Unknown,
    /// The heads do not fit, in words.
    Unfit(String),
}

impl Rows {
    /// Where each row and column of a weight lies in the tensor of that name within its block.
    ///
    /// # Errors
    /// If the heads are not known, or do not fit the extents.
    pub fn orders(
        self,
        tensor: &str,
        heads: Heads,
        outputs: u64,
        inputs: u64,
    ) -> Result<Orders, Unordered> {
        let of_rows = |order: Vec<u64>| Orders { outputs: Some(Arc::new(order)), inputs: None };
        match (self, tensor) {
            (Self::Rotary, "attn_q") => rotary(outputs, heads.queries).map(of_rows),
            (Self::Rotary, "attn_k") => rotary(outputs, heads.keys).map(of_rows),
            (Self::FusedByHead, "attn_qkv") => fused(outputs, heads).map(of_rows),
            (Self::LinearAttention, _) => linear(tensor, heads, outputs, inputs),
            _ => Ok(Orders::default()),
        }
    }
}

fn rotary(rows: u64, heads: Option<u64>) -> Result<Vec<u64>, Unordered> {
    let heads = heads.ok_or(Unordered::Unknown)?;
    if heads == 0 || !rows.is_multiple_of(heads) || !(rows / heads).is_multiple_of(2) {
        return Err(Unordered::Unfit(format!(
            "has {rows} rows, which are no {heads} heads of two halves"
        )));
    }
    let width = rows / heads;
    let place = |row: u64| {
        let (head, within) = (row / width, row % width);
        let (half, pair) = (within / (width / 2), within % (width / 2));
        head * width + 2 * pair + half
    };
    Ok((0..rows).map(place).collect())
}

fn fused(rows: u64, heads: Heads) -> Result<Vec<u64>, Unordered> {
    let (Some(queries), Some(groups)) = (heads.queries, heads.keys) else {
        return Err(Unordered::Unknown);
    };
    let all = groups.checked_mul(2).and_then(|twice| twice.checked_add(queries)).unwrap_or(0);
    if groups == 0 || all == 0 || !queries.is_multiple_of(groups) || !rows.is_multiple_of(all) {
        return Err(Unordered::Unfit(format!(
            "has {rows} rows, which are no {queries} heads of queries and {groups} of keys and values"
        )));
    }
    let (width, members) = (rows / all, queries / groups);
    let place = |row: u64| {
        let (head, within) = (row / width, row % width);
        let (group, member) = (head / (members + 2), head % (members + 2));
        let stored = match member {
            query if query < members => group * members + query,
            key if key == members => queries + group,
            _ => queries + groups + group,
        };
        stored * width + within
    };
    Ok((0..rows).map(place).collect())
}

fn linear(tensor: &str, heads: Heads, outputs: u64, inputs: u64) -> Result<Orders, Unordered> {
    let parts = ["attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_out"];
    if !parts.contains(&tensor) {
        return Ok(Orders::default());
    }
    let (keys, values, width) = heads.linear.ok_or(Unordered::Unknown)?;
    if keys == values {
        return Ok(Orders::default());
    }
    let extent = if tensor == "ssm_out" { inputs } else { outputs };
    // Queries and keys come first, and stay.
    let first = if tensor == "attn_qkv" { 2 * keys * width } else { 0 };
    let rest = extent.checked_sub(first).filter(|rest| values > 0 && rest.is_multiple_of(values));
    let (Some(rest), true) = (rest, keys > 0 && values.is_multiple_of(keys)) else {
        return Err(Unordered::Unfit(format!(
            "has an extent of {extent}, which is no {values} heads of values of {keys} of keys"
        )));
    };
    let (width, members) = (rest / values, values / keys);
    let place = |row: u64| match row.checked_sub(first) {
        None => row,
        Some(row) => {
            let (head, within) = (row / width, row % width);
            let (key, member) = (head / members, head % members);
            first + (member * keys + key) * width + within
        }
    };
    let order = Some(Arc::new((0..extent).map(place).collect()));
    Ok(match tensor {
        "ssm_out" => Orders { outputs: None, inputs: order },
        _ => Orders { outputs: order, inputs: None },
    })
}

/// The order that undoes another.
pub fn inverse(order: &[u64]) -> Vec<u64> {
    let mut inverse = vec![0; order.len()];
    for (place, stored) in order.iter().enumerate() {
        inverse[*stored as usize] = place as u64;
    }
    inverse
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(rows: Rows, tensor: &str, heads: Heads, extent: u64) -> Vec<u64> {
        let orders = rows.orders(tensor, heads, extent, extent).expect("they fit");
        orders.outputs.expect("in another order").to_vec()
    }

    #[test]
    fn halves_of_heads_are_interleaved() {
        let heads = Heads { queries: Some(2), keys: Some(1), linear: None };
        // Two heads of four rows: the file has the first of each half beside one another.
        assert_eq!(rows(Rows::Rotary, "attn_q", heads, 8), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(rows(Rows::Rotary, "attn_k", heads, 6), [0, 2, 4, 1, 3, 5]);
        assert_eq!(Rows::Rotary.orders("attn_v", heads, 8, 8), Ok(Orders::default()));
        let unfit = Rows::Rotary.orders("attn_q", heads, 6, 8).expect_err("three rows a head");
        assert_eq!(
            unfit,
            Unordered::Unfit("has 6 rows, which are no 2 heads of two halves".into())
        );
        let unknown = Rows::Rotary.orders("attn_q", Heads::default(), 6, 8);
        assert_eq!(unknown, Err(Unordered::Unknown));
    }

    #[test]
    fn fused_heads_are_sorted_by_kind() {
        let heads = Heads { queries: Some(2), keys: Some(2), linear: None };
        // (q0 k0 v0) (q1 k1 v1), each of one row; the file has q0 q1 k0 k1 v0 v1.
        assert_eq!(rows(Rows::FusedByHead, "attn_qkv", heads, 6), [0, 2, 4, 1, 3, 5]);
        let grouped = Heads { queries: Some(4), keys: Some(2), linear: None };
        // (q0 q1 k0 v0) (q2 q3 k1 v1).
        assert_eq!(rows(Rows::FusedByHead, "attn_qkv", grouped, 8), [0, 1, 4, 6, 2, 3, 5, 7]);
        let one = Heads { queries: Some(3), keys: Some(1), linear: None };
        assert_eq!(rows(Rows::FusedByHead, "attn_qkv", one, 5), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn heads_of_values_are_sorted_by_their_place_under_a_key() {
        let heads = Heads { linear: Some((2, 4, 1)), ..Heads::default() };
        assert_eq!(rows(Rows::LinearAttention, "ssm_alpha", heads, 4), [0, 2, 1, 3]);
        assert_eq!(rows(Rows::LinearAttention, "attn_qkv", heads, 8), [0, 1, 2, 3, 4, 6, 5, 7]);
        let out = Rows::LinearAttention.orders("ssm_out", heads, 3, 8).expect("they fit");
        assert_eq!(out.inputs.expect("columns").to_vec(), [0, 1, 4, 5, 2, 3, 6, 7]);
    }

    #[test]
    fn an_inverse_undoes_an_order() {
        let order = [0, 2, 4, 1, 3, 5];
        let back: Vec<u64> = inverse(&order).iter().map(|place| order[*place as usize]).collect();
        assert_eq!(back, [0, 1, 2, 3, 4, 5]);
    }
}
