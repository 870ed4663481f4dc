"""Mutations that change nothing a test could see, and why: (function, kind, piece before) -> reason; "*" is any."""

_SAME_BYTE = "1.5 * 2^23 + n has the same lowest byte as an integer and as the bits of a float32"
_NOT_STORED = "what is loaded beyond the end is not stored; test_overruns.py and its like hold the addresses"
_SAME_BITS = "the path with masks gives the same bits, it is only slower"
_SAME_RECIPROCAL = "1 * (1 / x) rounds as div_rn in the interpreter; on a GPU, where it does not, parity shows it"
_TIMES_ZERO = "what it is multiplied by is 0 there"
_PROMISE = "a promise to the compiler: a GPU would fault, the interpreter does not read it"
_NO_PTX = "the interpreter has no PTX; for compute capability 8.8 it would not compile"

EXPLAINED: dict[tuple[str, str, str], str] = {
    ("*", "int64 cast dropped", "*"): "differs from 2^31 elements on, which the tests marked gpu go beyond",
    ("pointer", "condition negated", "ALIGNED"): _PROMISE,
    ("int8_nearest", "bitcast to cast", "*"): _SAME_BYTE,
    ("encode_signed", "bitcast to cast", "*"): _SAME_BYTE,
    ("encode_unsigned", "bitcast to cast", "*"): _SAME_BYTE,
    ("_dequantize_kernel", "< to <=", "block * WIDTH < numel"): _NOT_STORED,
    ("_dequantize_kernel", "mask dropped", "*"): _NOT_STORED,
    ("_dequantize_kernel", "other changed", "*"): _NOT_STORED,
    ("_quantize_long_kernel", "mask dropped", "*"): _NOT_STORED,
    ("load_tile", "other changed", "*"): "every caller asks for 0",
    ("flat_tile", "<= to <", "start + TILE <= numel"): _SAME_BITS,
    ("flat_tile", "threshold off by one", "start + TILE <= numel"): _SAME_BITS,
    ("_line", "constant changed", "code_ptr + _CODES - 1"): "any end keeps buckets ascending; the last makes them fine",
    ("_quantize_tile_kernel", "other changed", "*"): "the bits 1 are a subnormal amax, which counts as 0",
    (
        "_quantize_tile_kernel",
        "mask dropped",
        "tl.store(scale_ptr + one, scale, mask=tl.program_id(0) == 0)",
    ): "the other programs store the same scale",
    ("scales", "threshold off by one", 'amax < float("inf")'): "infinity - 1 is infinity",
    (
        "scales",
        "division by reciprocal",
        "tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(quantizable, scale, 1.0))",
    ): _SAME_RECIPROCAL,
    ("_dequantize_rowwise_kernel", "other changed", "*"): _NOT_STORED,
    ("_gemv_4bit_kernel", "other changed", "*"): _TIMES_ZERO,
    ("_gemv_words_kernel", "other changed", "*"): _TIMES_ZERO,
    ("_sum_splits_kernel", "other changed", "*"): _NOT_STORED,
    ("_scales_of_amax_kernel", "other changed", "*"): _NOT_STORED,
    ("_requantize_4bit_kernel", "other changed", "*"): _NOT_STORED,
    ("fp8_words", "condition negated", "*"): _NO_PTX,
    ("mantissa_stochastic", "< to <=", "*"): "at the smallest normal number both spacings are the same",
    ("_quantize_4bit_kernel", "division by reciprocal", "*"): _SAME_RECIPROCAL,
    ("_fake_quantize_blocks_kernel", "division by reciprocal", "*"): _SAME_RECIPROCAL,
    ("_fake_quantize_blocks_kernel", "threshold off by one", 'scale < float("inf")'): "infinity - 1 is infinity",
    ("_fake_quantize_tensor_kernel", "threshold off by one", "scale > 0"): "with a scale of 0 every code stands for 0",
    ("_column_codes_kernel", "other changed", "*"): _NOT_STORED,
    ("_column_codes_kernel", "half of a mask dropped", "*"): "the other programs of a strip store the same scale",
    ("add_outliers", "< to <=", "first < count"): "one more step adds zeros",
    ("_mixed_scaled_mm_kernel", "other changed", "*"): _TIMES_ZERO,
    ("_outlier_columns_kernel", "other changed", "*"): _TIMES_ZERO,
    ("_outlier_columns_kernel", "mask dropped", "*"): "the columns that it then reads are masked by the same condition",
    ("_add_far_outlier", "other changed", "*"): _TIMES_ZERO,
    ("_mixed_scaled_mm_tma_kernel", "other changed", "*"): "without outliers nothing is added",
    ("_mixed_scaled_mm_tma_kernel", "mask dropped", "*"): "what is loaded ahead of the end is not added",
    ("_quantize_scales_kernel", "division by reciprocal", "*"): _SAME_RECIPROCAL,
    ("_quantize_scales_kernel", "other changed", "*"): "the next line masks it again",
    ("_dequantize_scales_kernel", "other changed", "*"): _NOT_STORED,
    ("_rescale_kernel", "other changed", "*"): _NOT_STORED,
    (
        "_rank",
        "bitcast to cast",
        "*",
    ): "1.5 * 2^23 + n has the same low bits as an integer and as the bits of a float32",
    ("_inliers", "statement dropped", "*"): "a comparison with a float32 threshold promotes x anyway",
    ("_mark", "< to <=", "column < K"): "beyond K the values are 0, below any threshold",
    ("_mark", "half of a mask dropped", "*"): "found is 1 where there is no outlier",
    ("*", "+ to -", "numbers_ptr + _DECAY"): "_DECAY is 0",
    ("_ademamix_numbers", "threshold off by one", "*"): "a quotient by 0 is infinite or NaN, the minimum the other one",
    ("_prepare_kernel", "int64 cast dropped", "*"): "random_word makes the same 32 bits of a step in float32",
    ("decode_e4m3", "threshold off by one", "PTX >= _CONVERTS"): _NO_PTX,
    ("_code", "threshold off by one", "PTX >= _CONVERTS"): _NO_PTX,
    ("line_pointers", "bitcast to cast", "*"): "a pointer keeps its bits either way",
    ("encode_signed", "< to <=", "signed < _LOWEST_CELL"): "a value at a midpoint may get either code",
    ("_squares_kernel", "<= to <", "start + TILE <= end"): _SAME_BITS,
    ("_load_tile", "other changed", "*"): _NOT_STORED,
    ("load_moment_tile", "other changed", "*"): _NOT_STORED,
    ("load_weight", "other changed", "*"): _NOT_STORED,
    ("_load_decayed", "other changed", "*"): _NOT_STORED,
    ("_flat_update_kernel", "other changed", "*"): _NOT_STORED,
    ("_flat_update_kernel", "half of a mask dropped", "*"): "beyond the mask gradients are 0",
    ("encode_signed", "< to <=", "v < 0"): "at 0 the distance from the code of zero is 0, whatever its sign",
}


def explanation(function: str, kind: str, before: str) -> str | None:
    for where in (function, "*"):
        for piece in (before, "*"):
            if (where, kind, piece) in EXPLAINED:
                return EXPLAINED[where, kind, piece]
    return None
