_base_ = './deeplabv3plus_r50_manpp_k2.py'

# One block a process: tools/dist_train.sh configs/deeplabv3plus_r50_manpp_k2_pipeline.py 2, or a multiple of 2 for replicas.
runner_type = 'mmman.PipelineRunner'
