import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.train.profile import GROUPS, Event, breakdown, classify, profiled_events

# Names in profiles of an H100 and of a CPU.
NAMES = {
    "matmul": [
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopA_NNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize2x1x1_execute_segment_k_off_kernel__5x_cublas",
        "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64_64x6_tn_align8>(T1::Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(...)",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16>(...)",
        "triton_tem_fused_mm_3",
        "aten::addmm",
        "aten::mm",
    ],
    "attention": [
        "attention_forward",
        "attention_backward_q",
        "attention_decode",
        "tilewright::attention_backward",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>(Flash_fwd_params)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_32_64x64x128_4x1x1_kernel0_0",
        "fmha_cutlassB_bf16_aligned_64x64_k64_sm80",
        "triton_tem_fused_flex_attention_0",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ],
    "own": ["rms_norm_forward", "swiglu_backward", "cross_entropy_fused", "rope_forward", "tilewright::rms_norm"],
    "elementwise": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul>>(...)",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>(...)",
        "triton_poi_fused_addmm_silu_mul_2",
        "triton_red_fused__scaled_dot_product_flash_attention_add_mm_1",
        "aten::add",
    ],
    "optimizer": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor<float, 4>>(...)",
        "triton_for_fused_0",
        "aten::_fused_adamw_",
        "aten::_foreach_norm",
    ],
    "copy": ["Memcpy HtoD (Pinned -> Device)", "Memset (Device)", "aten::copy_"],
    "communication": ["ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "group"), [(name, group) for group, names in NAMES.items() for name in names])
def test_classify_kernels_by_name(name, group):
    assert classify(name) == group


def test_time_without_a_kernel_is_idle():
    events = [Event("nvjet_a", 1.0, 2.0), Event("swiglu_forward", 2.5, 3.0), Event("ncclDevKernel_x", 4.0, 5.0)]
    groups = breakdown(events)
    assert {name: seconds for name, seconds in groups.items() if seconds} == {
        "matmul": 1.0, "own": 0.5, "communication": 1.0, "idle": 1.5,
    }  # fmt: skip
    assert list(groups) == list(GROUPS)
    assert breakdown(events, seconds=2.75)["idle"] == 0.25
    assert breakdown(events, seconds=2.0)["idle"] == 0
    assert sum(breakdown([]).values()) == 0


def test_overlapping_time_counts_once():
    # A copy overlaps a product, one kernel lies inside another, and one starts when others end.
    events = [
        Event("nvjet_a", 0.0, 2.0),
        Event("Memcpy DtoH", 1.0, 3.0),
        Event("swiglu_forward", 1.5, 2.5),
        Event("nvjet_b", 3.0, 4.0),
    ]
    assert breakdown(events) == pytest.approx({**dict.fromkeys(GROUPS, 0.0), "matmul": 3.0, "copy": 1.0})


times = st.integers(0, 1000)


@given(st.lists(st.tuples(st.sampled_from(["nvjet_a", "Memcpy", "attention_forward", "add"]), times, times), min_size=1))
def test_groups_sum_to_the_total_time(drawn):
    events = [Event(name, min(a, b), max(a, b)) for name, a, b in drawn]
    groups = breakdown(events)
    assert sum(groups.values()) == max(event.end for event in events) - min(event.start for event in events)
    assert min(groups.values()) >= 0


def test_cpu_profile_excludes_nested_operators():
    layer = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        layer(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()
    events = profiled_events(profiler)
    assert {"aten::addmm", "aten::_fused_adamw_"} <= {event.name for event in events}
    groups = breakdown(events)
    assert min(groups["matmul"], groups["optimizer"], groups["elementwise"], groups["idle"]) > 0


@pytest.mark.gpu
def test_a_profile_of_a_gpu_holds_kernels_only():
    a = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        (a @ a).relu()
        torch.cuda.synchronize()
    groups = breakdown(profiled_events(profiler))
    assert groups["matmul"] > 0
    assert groups["elementwise"] > 0
